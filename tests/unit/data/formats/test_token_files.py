"""Headerless, datatrove's and presequenced files give the same windows as a .bin/.idx pair."""

import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import training
from token_formats import (
    CUT,
    SEQ_LEN,
    SEQUENCES,
    SHARDS,
    STREAMS,
    TOKENS,
    VOCAB,
    write_all,
    write_ds,
    write_pair,
    write_raw,
)

from titan_cpt.common.batch_sizes import BatchSizes
from titan_cpt.data.formats.token_files import TokenFiles, count_source, open_source
from titan_cpt.data.inventory import open_sources, take_inventory, training_files
from titan_cpt.data.loader import SequenceReader, StageLoader
from titan_cpt.data.mixture import Draw
from titan_cpt.errors import ConfigError, DataError
from titan_cpt.planning.planner import make_plan

pytestmark = training.THEIR_WARNINGS_IGNORED


@pytest.fixture
def files(tmp_path):
    return write_all(tmp_path)


def rows(source, draws=range(SEQUENCES), seed=0, seq_len=SEQ_LEN):
    reader = SequenceReader({"x": source}, seq_len=seq_len, seed=seed)
    return reader.read([Draw("x", ordinal, False) for ordinal in draws]).tokens


@pytest.mark.parametrize("name", STREAMS)
def test_every_format_gives_the_windows_of_a_pair_with_the_same_tokens(files, name):
    """Windows, count and shuffled order over two epochs."""
    pair, other = (open_source(files[each], VOCAB) for each in ("pair", name))

    assert other.tokens == len(TOKENS)
    assert other.windows(SEQ_LEN) == pair.windows(SEQ_LEN) == (40 * 17 - 1) // 16
    assert np.array_equal(rows(other, range(84)), rows(pair, range(84)))
    assert not np.array_equal(rows(other, range(42)), rows(other, range(42, 84)))


@pytest.mark.parametrize("name", CUT)
def test_presequenced_windows_share_no_token_and_keep_the_order_of_the_files(files, name):
    """Window k is tokens 17 k to 17 k + 16, in every epoch; one sequence continues in the next shard."""
    source = open_source(files[name], VOCAB)

    assert source.windows(SEQ_LEN) == 40
    assert np.array_equal(rows(source), TOKENS.reshape(40, 17))
    assert np.array_equal(rows(source, range(30, 50)), TOKENS.reshape(40, 17)[[*range(30, 40), *range(10)]])


@pytest.mark.parametrize("name", ["pair", "shards", "ds"])
def test_order_as_stored_reads_windows_in_stored_order(files, name):
    """order = "as_stored": window k is the k-th, and shares a token with the next."""
    asked = TokenFiles(files[name].spec, files[name].format, files[name].dtype, True)
    found = rows(open_source(asked, VOCAB), range(42))

    assert found[:3].tolist() == [TOKENS[0:17].tolist(), TOKENS[16:33].tolist(), TOKENS[32:49].tolist()]


def test_presequenced_data_may_be_shuffled(files):
    """All sequences, each once, in another order."""
    asked = TokenFiles(files["even"].spec, "presequenced", None, False)
    found = rows(open_source(asked, VOCAB)).tolist()

    assert sorted(found) == sorted(TOKENS.reshape(40, 17).tolist())
    assert found != TOKENS.reshape(40, 17).tolist()


@pytest.mark.parametrize("name", ["pair", *STREAMS, *CUT])
def test_counts_from_headers_are_right(files, name):
    """Tokens, and sequences if the files define them."""
    counted, source = count_source(files[name], SEQ_LEN), open_source(files[name], VOCAB)

    assert counted.tokens == source.tokens
    assert counted.sequences in (None, source.windows(SEQ_LEN))
    assert (counted.sequences is None) == (name not in CUT)


@pytest.mark.parametrize("name", ["raw-uint16", "ds", "even-shards"])
def test_every_source_can_be_pickled(files, name):
    """Spawned workers receive it by pickle, also after a read."""
    source = open_source(files[name], VOCAB)
    here = rows(source)

    assert np.array_equal(rows(pickle.loads(pickle.dumps(source))), here)


def test_fingerprints_depend_on_tokens_dtype_and_window_borders(files, tmp_path):
    """A copy has the same one."""
    print_of = {name: open_source(each, VOCAB).fingerprint() for name, each in files.items()}
    (tmp_path / "elsewhere").mkdir()
    moved = open_source(write_all(tmp_path / "elsewhere")["ds"], VOCAB).fingerprint()
    write_raw(tmp_path / "raw-uint16", tokens=[*TOKENS[:-1], (TOKENS[-1] + 1) % VOCAB])
    changed = open_source(files["raw-uint16"], VOCAB).fingerprint()
    write_ds(tmp_path / "two.ds", ends=(100, 680))
    recut = open_source(files["ds"], VOCAB).fingerprint()
    as_stream = open_source(TokenFiles(files["even"].spec), VOCAB).fingerprint()

    assert moved == print_of["ds"]
    assert len({*print_of.values(), changed, recut, as_stream}) == len(files) + 3


@pytest.mark.parametrize("name", ["raw-uint16", "ds", "ds-wide", "even-shards", "headed"])
def test_a_truncated_file_is_refused(files, name):
    """By the count for the plan and on open: at every length that is not a whole number of tokens; .ds and sequences at
    any length.
    """
    path = Path(files[name].spec[0].replace("*", SHARDS[2]))
    whole = path.read_bytes()
    lengths = range(1, 40, 2) if name == "raw-uint16" else range(1, len(whole), 7)
    for length in lengths:
        path.write_bytes(whole[:-length])
        if name == "even-shards" and length % 34 == 0:
            continue  # a whole sequence less is a file of its own
        with pytest.raises(DataError, match=r"damaged|not a multiple|cannot be read"):
            count_source(files[name], SEQ_LEN)
        with pytest.raises(DataError, match=r"damaged|not a multiple|cannot be read"):
            open_source(files[name], VOCAB).windows(SEQ_LEN)


@pytest.mark.parametrize(("written", "read"), [("uint32", "uint16"), ("int64", "uint16"), ("int64", "uint32")])
def test_a_dtype_narrower_than_the_file_is_refused(tmp_path, written, read):
    """Halves of ids are in the vocabulary; only the zeros between them reveal the error."""
    write_raw(tmp_path / "x.bin", written)

    with pytest.raises(DataError, match=rf"x\.bin: every second id is 0 or less.*Is the dtype .*int.*, not {read} as"):
        open_source(TokenFiles((str(tmp_path / "x.bin"),), "raw", read), VOCAB)


def test_a_narrower_dtype_is_refused_for_a_large_vocabulary_too(tmp_path):
    """Llama 3's 128,256 ids need 17 bits: the upper halves are 0 and 1."""
    write_raw(tmp_path / "x.bin", "uint32", np.random.default_rng(0).integers(0, 128_256, size=1000))

    with pytest.raises(DataError, match="every second id is 1 or less"):
        open_source(TokenFiles((str(tmp_path / "x.bin"),), "raw", "uint16"), 128_256)


def test_a_dtype_wider_than_the_file_is_refused(tmp_path):
    """Two ids read as one are outside any vocabulary; the message asks about the dtype."""
    write_raw(tmp_path / "x.bin", "uint16")

    with pytest.raises(DataError, match=r"x\.bin: token 0 has id \d+; allowed .* 256.* another dtype than uint32"):
        open_source(TokenFiles((str(tmp_path / "x.bin"),), "raw", "uint32"), VOCAB)


@pytest.mark.parametrize("name", ["raw-uint16", "ds", "even-shards", "headed"])
def test_ids_outside_the_vocabulary_are_refused_on_open(files, name):
    """The largest id of these tokens is 256."""
    with pytest.raises(DataError, match="has id 256; allowed are ids from 0 to 255"):
        open_source(files[name], 256)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (TOKENS.astype("<u4"), "header says uint32 of shape .*allowed is dtype = uint16.* one dimension"),
        (TOKENS.astype("<u2").reshape(40, 17), r"says uint16 of shape \(40, 17\)"),
        (TOKENS.astype("<f4"), "contains float32; allowed are integers"),
    ],
)
def test_a_npy_header_is_compared_with_the_config(tmp_path, array, message):
    """Its bytes are never read as tokens."""
    np.save(tmp_path / "x.npy", array)

    with pytest.raises(DataError, match=message):
        open_source(TokenFiles((str(tmp_path / "x.npy"),), "raw", "uint16"), VOCAB)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ((100, 90, 680), "document 0 ends at token 100, and the next one at 90"),
        ((100, 679), "the 679 tokens of its index take 1358 bytes as uint16"),
        ((100, 170), "dtype|damaged"),  # 680 x 2 bytes would be 8 bytes each
        ((), "the 0 tokens of its index"),
    ],
)
def test_a_ds_index_that_does_not_match_its_file_is_refused(tmp_path, ends, message):
    """Decreasing ends, and ends that disagree with the length."""
    write_ds(tmp_path / "x.ds", ends=ends)

    with pytest.raises(DataError, match=message):
        open_source(TokenFiles((str(tmp_path / "x.ds"),), "ds"), VOCAB)


def test_a_ds_index_is_required_and_its_length_checked(tmp_path):
    """Missing, or truncated inside an entry; an index without documents is valid."""
    write_ds(tmp_path / "x.ds")
    write_ds(tmp_path / "empty.ds", tokens=(), ends=())
    both = TokenFiles((str(tmp_path / "*"),), "ds")
    assert open_source(both, VOCAB).tokens == count_source(both, SEQ_LEN).tokens == len(TOKENS)
    index = tmp_path / "x.ds.index"
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"x\.ds\.index: 31 bytes are not a multiple of 8"):
        count_source(both, SEQ_LEN)
    index.unlink()

    with pytest.raises(DataError, match=r"x\.ds\.index: is missing.*save_index.*format = \"raw\""):
        count_source(both, SEQ_LEN)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((17,) * 38 + (16, 18), "sequence 38 has 16 tokens, the first one 17"),
        ((34,) * 20, "sequences of 34 tokens; allowed is training.seq_len . 1 = 17.*set training.seq_len = 33"),
    ],
)
def test_entries_of_different_lengths_are_not_sequences(tmp_path, sizes, message):
    """Documents are not accepted as sequences."""
    write_pair(tmp_path / "x", sizes)

    with pytest.raises(DataError, match=message):
        open_source(TokenFiles((str(tmp_path / "x"),), "presequenced", None, True), VOCAB).windows(SEQ_LEN)


def test_sequences_of_another_length_than_seq_len_are_refused_by_the_plan(files):
    """seq_len 2048 for sequences of 17: seen in the first entry, and for headerless files in the length."""
    for name in CUT:
        with pytest.raises(DataError, match=r"training\.seq_len"):
            count_source(files[name], 2048)


def test_missing_files_and_files_named_twice_are_refused(tmp_path):
    """A path, a glob that matches only the index, a file that two entries name."""
    write_ds(tmp_path / "x.ds")
    at = str(tmp_path)
    for spec, format_, message in [
        ((f"{at}/y.bin",), "raw", "no file of that name"),
        ((f"{at}/*.index",), "ds", r"no \*\.ds file of that name"),
        ((f"{at}/x.ds", f"{at}/*.ds"), "raw", "a second time"),
    ]:
        with pytest.raises(DataError, match=message):
            open_source(TokenFiles(spec, format_, "uint16" if format_ == "raw" else None), VOCAB)


def test_a_raw_file_truncated_while_it_is_open_is_a_data_error(files):
    """As for .bin: the process neither crashes nor reads other tokens."""
    source = open_source(files["raw-uint16"], VOCAB)
    Path(files["raw-uint16"].spec[0]).write_bytes(b"\x00" * 100)

    with pytest.raises(DataError, match=r"100 bytes, but 1360 when this run opened it"):
        source.window(0, SEQ_LEN)


@pytest.mark.parametrize("format_", ["raw", "ds", "presequenced"])
def test_huge_files_are_counted_and_opened_quickly(tmp_path, format_):
    """Half a terabyte of zeros in a sparse file: the plan takes milliseconds, opening reads no more than its scan."""
    tokens = 17 * 2**34
    with open(tmp_path / "x.ds", "wb") as file:
        file.truncate(2 * tokens)
    np.array([tokens], dtype="<u8").tofile(tmp_path / "x.ds.index")
    files = TokenFiles((str(tmp_path / "x.ds"),), format_, None if format_ == "ds" else "uint16", True)
    began = time.perf_counter()
    counted = count_source(files, SEQ_LEN)
    planned = time.perf_counter() - began
    source = open_source(files, VOCAB)
    source.window(source.windows(SEQ_LEN) - 1, SEQ_LEN)

    assert counted.tokens == source.tokens == tokens
    assert planned < 0.1
    assert time.perf_counter() - began < 10


# In a config


def config_with(tmp_path, english):
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw["datasets"]["en"] = english
    return raw


def test_a_stage_reads_presequenced_data_in_order_and_starts_at_any_step(tmp_path):
    """Step s of 4 sequences is sequences 4 s to 4 s + 3 of the file; from step 5 it continues with sequence 20."""
    write_raw(tmp_path / "s.bin")
    table = {
        "train": str(tmp_path / "s.bin"),
        "format": "presequenced",
        "dtype": "uint16",
        "validation_format": "indexed",
    }
    raw = config_with(tmp_path, table | {"validation": str(tmp_path / "en-validation")})
    config = training.config_of(raw)
    plan = make_plan(config, take_inventory(config))
    reader = SequenceReader(open_sources(training_files(config), VOCAB), seq_len=SEQ_LEN, seed=0)
    english = plan.stages[0]
    loader = StageLoader(
        reader,
        lambda step: plan.batch(english, step),
        steps=12,
        first_step=5,
        batch_sizes=BatchSizes.constant(4),
        local_batch=2,
        rank=0,
        ranks=1,
        workers=0,
    )
    batch = loader.batch(5, 0)

    assert plan.sequences["en", 16] == 40
    assert np.array_equal(batch.inputs_BL, TOKENS.reshape(40, 17)[20:22, :-1])
    assert np.array_equal(batch.targets_BL, TOKENS.reshape(40, 17)[20:22, 1:])


def test_the_recipe_contains_only_the_settings_that_determine_the_order(tmp_path):
    """A shuffled stream of any format has no entry, so older checkpoints resume."""
    write_raw(tmp_path / "s.bin")
    at = {"train": str(tmp_path / "s.bin"), "dtype": "uint16"}
    recipes = []
    for table in (
        at | {"format": "raw"},
        at | {"format": "raw", "order": "as_stored"},
        at | {"format": "presequenced"},
    ):
        config = training.config_of(config_with(tmp_path, table))
        recipes.append(make_plan(config, take_inventory(config)).stages[0].recipe)

    assert [recipe.get("order.en") for recipe in recipes] == [None, "windows, as stored", "presequenced, as stored"]
    assert {key for recipe in recipes for key in recipe if key.startswith("order.")} == {"order.en"}


def test_a_resume_refuses_another_order_of_the_same_tokens(tmp_path):
    """A run that began with windows in stored order does not resume with shuffled ones."""
    raw = config_with(tmp_path, {"train": str(tmp_path / "en"), "order": "as_stored"})
    raw["stages"] = [{"name": "one", "dataset": "en", "steps": 2, "lr": {"schedule": "constant", "max": 1e-3}}]
    path = training.write_config(raw, tmp_path / "x.toml")
    first = training.train(path)
    again = training.train(path, "--datasets.en.order", "shuffled", "--stages.one.steps", "4")

    assert first.status == 0, first.output
    assert again.status == 2
    assert "stages.one.order.en: windows, as stored -> not set" in again.output


def test_a_glob_that_includes_the_validation_file_is_refused(tmp_path):
    """nanoGPT's data/train.bin and data/val.bin under data/*.bin."""
    (tmp_path / "owt").mkdir()
    for name in ("train", "val"):
        write_raw(tmp_path / "owt" / f"{name}.bin")
    held_out = str(tmp_path / "owt" / "val.bin")
    table = {"train": str(tmp_path / "owt" / "*.bin"), "validation": held_out, "format": "raw", "dtype": "uint16"}

    with pytest.raises(
        DataError, match=r"datasets.en.train: includes .*val\.bin, which datasets.en.validation measures"
    ):
        take_inventory(training.config_of(config_with(tmp_path, table)))


def test_missing_raw_files_are_not_an_error_of_the_plan(tmp_path):
    """Their counts are unknown."""
    config = training.config_of(config_with(tmp_path, {"train": "none.bin", "format": "raw", "dtype": "uint16"}))

    assert take_inventory(config).tokens["en"] is None


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"format": "raw"}, 'format = "raw" needs dtype'),
        (
            {"format": "rwa", "dtype": "uint16"},
            "datasets.en.format: must be one of 'indexed', 'raw'.*did you mean 'raw'",
        ),
        ({"format": "raw", "dtype": "uint8"}, "datasets.en.dtype: must be one of"),
        ({"dtype": "uint16"}, 'format = "indexed" stores the dtype itself'),
        ({"format": "ds", "dtype": "uint16"}, 'format = "ds" stores the dtype itself: remove dtype'),
        ({"index_prefix": "x"}, 'index_prefix is for format = "megatron_order", got format = "indexed"'),
        ({"format": "megatron_order"}, "needs index_prefix"),
        (
            {"format": "megatron_order", "index_prefix": "x", "order": "shuffled"},
            "give one prefix as train, and remove order",
        ),
        ({"format": "megatron_order", "index_prefix": "x", "train": ["a", "b"]}, "give one prefix as train"),
        ({"order": "sorted"}, "datasets.en.order: must be one of 'shuffled', 'as_stored'"),
        ({"format": "ds", "source": {"text": "x.txt"}}, 'with source, format must be "indexed"'),
        ({"validation_format": "raw", "validation": "x"}, 'format = "raw" needs dtype'),
    ],
)
def test_keys_that_exclude_each_other_are_refused(tmp_path, table, message):
    """The message has the key and what is allowed."""
    with pytest.raises(ConfigError, match=f"datasets.en.*{message}|{message}"):
        training.config_of(config_with(tmp_path, {"train": "data/en"} | table))


def test_with_domains_the_format_belongs_to_each_domain(tmp_path):
    """One domain is raw, one a pair; a format of the dataset is refused."""
    write_raw(tmp_path / "web.bin")
    write_pair(tmp_path / "news")
    web = {"train": str(tmp_path / "web.bin"), "weight": 1.0, "format": "raw", "dtype": "uint16"}
    domains = {"web": web, "news": {"train": str(tmp_path / "news"), "weight": 2.0}}
    config = training.config_of(config_with(tmp_path, {"domains": domains}))
    assert take_inventory(config).tokens["en.web"] == take_inventory(config).tokens["en.news"] == len(TOKENS)

    with pytest.raises(ConfigError, match="with domains, set them in each domain"):
        training.config_of(config_with(tmp_path, {"domains": domains, "format": "ds"}))
