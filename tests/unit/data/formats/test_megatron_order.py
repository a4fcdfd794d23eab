"""The GPTDataset index files of Megatron: the i-th sequence is the one that the earlier run trained on i-th."""

import pickle
import time

import numpy as np
import pytest
import training
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from titan_cpt.data.formats import megatron_order
from titan_cpt.data.formats.indexed_writer import IndexedWriter
from titan_cpt.data.formats.token_files import TokenFiles, count_source, missing_entries, open_source
from titan_cpt.data.inventory import open_sources, take_inventory, training_files, validation_files
from titan_cpt.data.loader import SequenceReader
from titan_cpt.data.mixture import Draw
from titan_cpt.errors import DataError
from titan_cpt.planning.planner import make_plan

NEOX = ("_doc_idx.npy", "_sample_idx.npy", "_shuffle_idx.npy")
CORE = ("-document_index.npy", "-sample_index.npy", "-shuffle_index.npy")
HAND = [[10, 11, 12], [20, 21], [30, 31, 32, 33]]
REUSED_FOLDER = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_pair(prefix, documents):
    with IndexedWriter(prefix, 300) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def save(prefix, order, samples, shuffle, *, endings=NEOX, dtypes=("int32", "int32", "uint32")):
    for ending, array, dtype in zip(endings, (order, samples, shuffle), dtypes, strict=True):
        np.save(f"{prefix}{ending}", np.array(array, dtype=dtype))


def files_at(folder):
    return TokenFiles((str(folder / "x"),), "megatron_order", None, True, str(folder / "order"))


def hand(folder, **changed):
    """Nine tokens 30 31 32 33 10 11 12 20 21 in samples of 3 + 1: 30 31 32 33 and 33 10 11 12, in reverse order."""
    write_pair(folder / "x", HAND)
    arrays = {"order": [2, 0, 1], "samples": [[0, 0], [0, 3], [1, 2]], "shuffle": [1, 0]}
    save(folder / "order", **arrays | changed)
    return files_at(folder)


def build(documents, order, seq_len, rng):
    """Compute the three index files: sample k begins at token k x seq_len of the documents in that order."""
    sizes = np.array([len(documents[number]) for number in order])
    ends = np.cumsum(sizes)
    samples = (int(ends[-1]) - 1) // seq_len
    begins = np.arange(samples + 1) * seq_len
    places = np.searchsorted(ends, begins, side="right")
    return np.stack([places, begins - (ends - sizes)[places]], axis=1), rng.permutation(samples)


def rows(source, seq_len, draws):
    return (
        SequenceReader({"x": source}, seq_len=seq_len, seed=0)
        .read([Draw("x", ordinal, False) for ordinal in draws])
        .tokens
    )


@pytest.mark.parametrize("endings", [NEOX, CORE])
def test_samples_come_in_the_order_of_the_shuffle_index(tmp_path, endings):
    """By hand, in both naming schemes; the second epoch has the same order."""
    write_pair(tmp_path / "x", HAND)
    save(tmp_path / "order", [2, 0, 1], [[0, 0], [0, 3], [1, 2]], [1, 0], endings=endings)
    source = open_source(files_at(tmp_path), 300)

    assert source.windows(3) == 2
    assert rows(source, 3, range(3)).tolist() == [[33, 10, 11, 12], [30, 31, 32, 33], [33, 10, 11, 12]]


@pytest.mark.parametrize(
    "dtypes", [("int32", "int32", "uint32"), ("int32", "int64", "int64"), ("int64", "int64", "int64")]
)
@REUSED_FOLDER
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    epochs=st.integers(1, 3),
    seq_len=st.integers(2, 9),
    seed=st.integers(0, 9),
)
def test_every_sample_is_a_window_of_the_concatenated_documents(tmp_path, dtypes, sizes, epochs, seq_len, seed):
    """Law: with documents joined in doc_idx's order, sample s is tokens [s L, s L + L]; sequence i is s = shuffle[i].

    True for several epochs of documents, documents longer and shorter than a sample, and empty ones.
    """
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, 300, size=size).tolist() for size in sizes]
    order = rng.permutation(np.tile(np.arange(len(sizes)), epochs))
    joined = np.array([token for number in order for token in documents[number]])
    if len(joined) <= seq_len:
        return
    samples, shuffle = build(documents, order, seq_len, rng)
    write_pair(tmp_path / "x", documents)
    save(tmp_path / "order", order, samples, shuffle, dtypes=dtypes)
    files = files_at(tmp_path)
    source = open_source(files, 300)
    expected = [joined[s * seq_len : s * seq_len + seq_len + 1].tolist() for s in shuffle]

    assert rows(source, seq_len, range(len(shuffle))).tolist() == expected
    assert count_source(files, seq_len) == (sum(sizes), len(shuffle))


def test_two_epochs_of_a_subset_of_documents_with_a_separate_last_epoch_are_read(tmp_path):
    """Megatron's train split omits documents, and shuffles a last, partial epoch separately."""
    documents = [[number] * 5 for number in range(8)]
    order = [3, 1, 2, 2, 3, 1]
    samples, _ = build(documents, order, 4, np.random.default_rng(0))
    write_pair(tmp_path / "x", documents)
    save(tmp_path / "order", order, samples, [2, 0, 1, 3, 6, 5, 4])
    found = rows(open_source(files_at(tmp_path), 300), 4, range(7)).tolist()

    assert found[0] == [1, 1, 2, 2, 2]
    assert found[1] == [3, 3, 3, 3, 3]
    assert found[6] == [2, 2, 2, 2, 3]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shuffle": [1, 2]}, r"shuffle_idx.npy: entry 1 is 2, but there are 2 samples"),
        ({"shuffle": [1]}, r"shuffle_idx.npy: 1 entries, but order_sample_idx.npy has 2 samples"),
        ({"shuffle": [[1, 0]]}, r"shuffle_idx.npy: uint32 of shape \[1, 2\]; allowed"),
        ({"order": [2, 0, 3]}, r"doc_idx.npy: entry 2 is 3, but there are 3 documents of x.idx"),
        ({"order": [2, -1, 1]}, r"doc_idx.npy: entry 1 is -1|document -1"),
        ({"order": [2, 1, 0]}, r"sample 1 takes tokens 0 to 3 of document 1, which has 2"),
        ({"order": [2]}, r"sample 1 spans entries 0 to 1 of order_doc_idx.npy, which has 1"),
        ({"samples": [[0, 0], [0, 3], [1, 3]]}, r"sample 1 takes tokens 0 to 4 of document 0, which has 3"),
        ({"samples": [[0, 0], [0, 3], [1, 1]]}, r"sample 1 has 3 tokens; allowed is training.seq_len . 1 = 4"),
        ({"samples": [[0, -1], [0, 3], [1, 2]]}, r"sample 0 takes tokens -1 to 4"),
        ({"samples": [[1, 0], [0, 3], [1, 2]]}, r"sample 0 spans entries 1 to 0"),
        ({"samples": [0, 0, 0, 3, 1, 2]}, r"sample_idx.npy: int32 of shape \[6\]; allowed .*\[samples \+ 1, 2\]"),
        ({"samples": [[0, 0]], "shuffle": []}, r"0 entries, but .* has 0 samples"),
    ],
)
def test_an_index_out_of_range_or_of_other_data_is_refused_on_open(tmp_path, changed, message):
    """Each of the three files; the message has the entry and the allowed range."""
    with pytest.raises(DataError, match=message):
        open_source(hand(tmp_path, **changed), 300)


@pytest.mark.parametrize("ending", NEOX)
def test_a_truncated_index_file_is_refused(tmp_path, ending):
    """By the count for the plan and on open."""
    files = hand(tmp_path)
    path = tmp_path / f"order{ending}"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        for opened in (lambda: count_source(files, 3), lambda: open_source(files, 300)):
            with pytest.raises(DataError, match=ending):
                opened()


def test_an_order_of_another_length_is_refused_by_the_plan(tmp_path):
    """Made for seq_len 3, used with 4."""
    files = hand(tmp_path)

    with pytest.raises(DataError, match=r"sample 0 has 4 tokens; allowed is training.seq_len \+ 1 = 5"):
        count_source(files, 4)
    with pytest.raises(DataError, match=r"set training.seq_len to that of the run that saved the order"):
        rows(open_source(files, 300), 4, [0])


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    """As in any other pair."""
    with pytest.raises(DataError, match="has id 33; allowed are ids from 0 to 32"):
        open_source(hand(tmp_path), 33)


def test_a_sample_that_is_not_checked_on_open_is_checked_when_it_is_read(tmp_path, monkeypatch):
    """A large order is checked in blocks: a short sample between them is an error when it is read."""
    monkeypatch.setattr(megatron_order, "MEASURED_SAMPLES", 2048)
    samples = [[0, 3 * place] for place in range(9001)]
    samples[4000] = [0, 11999]  # one token early: sample 3999 is short, the next one long
    write_pair(tmp_path / "x", [list(range(256)) * 106])
    save(tmp_path / "order", [0], samples, np.arange(9000))
    source = open_source(files_at(tmp_path), 300)
    assert source.window(3998, 3).tolist() == [(3998 * 3 + place) % 256 for place in range(4)]

    with pytest.raises(DataError, match="sample 3999 has 3 tokens"):
        source.window(3999, 3)


def test_missing_index_files_are_named(tmp_path):
    """Without them the plan has no counts; opening names both naming schemes."""
    files = hand(tmp_path)
    (tmp_path / "order_shuffle_idx.npy").unlink()
    assert missing_entries(files) == [str(tmp_path / "order_shuffle_idx.npy")]

    with pytest.raises(
        DataError, match=r"order_shuffle_idx.npy: is missing.*PREFIX_doc_idx.npy.*PREFIX-document_index.npy"
    ):
        open_source(files, 300)


def test_the_fingerprint_depends_on_each_of_the_four_files(tmp_path):
    """Another shuffle, other samples, another order of documents or other tokens."""
    found = [open_source(hand(tmp_path), 300).fingerprint()]
    found.append(open_source(hand(tmp_path, shuffle=[0, 1]), 300).fingerprint())
    found.append(open_source(hand(tmp_path, order=[2, 0, 0]), 300).fingerprint())
    found.append(open_source(hand(tmp_path, samples=[[0, 0], [0, 3], [1, 2]]), 300).fingerprint())
    write_pair(tmp_path / "x", [*HAND[:2], [30, 31, 32, 34]])
    found.append(open_source(files_at(tmp_path), 300).fingerprint())
    found.append(open_source(TokenFiles(files_at(tmp_path).spec), 300).fingerprint())

    assert found[3] == found[0]
    assert len(set(found)) == 5


def test_an_order_can_be_pickled(tmp_path):
    """After a read."""
    source = open_source(hand(tmp_path), 300)
    here = source.window(0, 3)

    assert np.array_equal(pickle.loads(pickle.dumps(source)).window(0, 3), here)


def test_a_large_order_is_counted_and_opened_quickly(tmp_path):
    """Two million samples: milliseconds for the plan, and a bounded check on open."""
    tokens = np.arange(2_000_001 * 4, dtype=np.int64) % 300
    with IndexedWriter(tmp_path / "x", 300) as writer:
        writer.add_documents(tokens, np.full(2_000_001, 4))
    save(tmp_path / "order", np.arange(2_000_001), [], np.arange(2_000_000))
    np.save(tmp_path / "order_sample_idx.npy", np.stack([np.arange(2_000_001), np.zeros(2_000_001)], 1).astype("int64"))
    began = time.perf_counter()
    counted = count_source(files_at(tmp_path), 4)
    planned = time.perf_counter() - began
    source = open_source(files_at(tmp_path), 300)

    assert counted.sequences == source.windows(4) == 2_000_000
    assert planned < 0.1
    assert time.perf_counter() - began < 10


def test_a_stage_follows_the_order_and_starts_at_any_step(tmp_path):
    """Global batch s of 4 is samples shuffle[4 s : 4 s + 4]; the plan counts the order's samples, not windows."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 257, size=size).tolist() for size in rng.integers(1, 60, size=50)]
    order = rng.permutation(50)
    samples, shuffle = build(documents, order, 16, rng)
    write_pair(tmp_path / "x", documents)
    save(tmp_path / "order", order, samples, shuffle)
    validation = {"validation": str(tmp_path / "en-validation")}
    table = {"train": str(tmp_path / "x"), "format": "megatron_order", "index_prefix": str(tmp_path / "order")}
    raw["datasets"]["en"] = table | validation
    config = training.config_of(raw)
    plan = make_plan(config, take_inventory(config))
    reader = SequenceReader(open_sources(training_files(config), 257), seq_len=16, seed=5)
    joined = np.array([token for number in order for token in documents[number]])
    found = reader.read(plan.batch(plan.stages[0], 7)).tokens

    assert plan.sequences["en", 16] == len(shuffle)
    assert [files.format for _, files in validation_files(config)] == ["indexed", "indexed"]
    assert found.tolist() == [joined[s * 16 : s * 16 + 17].tolist() for s in shuffle[28:32]]
    assert plan.stages[0].recipe["order.en"] == "megatron_order, as stored"


def test_an_order_that_is_too_short_for_the_run_is_noted(tmp_path):
    """Two samples, but 12 steps of 4; the plan says where it differs from the earlier run."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    hand(tmp_path)
    index = {"format": "megatron_order", "index_prefix": str(tmp_path / "order")}
    raw["datasets"]["en"] = {"train": str(tmp_path / "x"), **index}
    raw["training"]["seq_len"] = 3
    config = training.config_of(raw)
    notes = make_plan(config, take_inventory(config)).notes

    assert (
        "stages.english: the stored order of en has 2 sequences, and 48 are needed: it is repeated from its beginning"
        in notes
    )
