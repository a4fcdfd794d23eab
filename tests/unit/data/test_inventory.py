"""The inventory of a config: counts from headers, refused overlaps and text files, notes. In every format."""

import numpy as np
import pytest
import training
from permissions import modes_count

from titan_cpt.data.formats.indexed_writer import IndexedWriter
from titan_cpt.data.formats.token_files import TokenFiles, missing_entries, resolve_paths
from titan_cpt.data.inventory import take_inventory
from titan_cpt.errors import DataError


def pair(prefix, tokens=(1, 2, 3)):
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(prefix, 300) as writer:
        writer.add_document(list(tokens))
    return prefix


def text_file(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("words\n")


def raw_file(path, tokens=range(100)):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.array(tokens, dtype="<u2").tofile(path)
    return path


def ds_file(path, tokens=range(100)):
    raw_file(path, tokens)
    np.array([len(tokens)], dtype="<u8").tofile(f"{path}.index")
    return path


def formats(folder):
    """{format: (write a set under a name, its ending in the config, further keys)}."""
    return {
        "indexed": (lambda name: pair(folder / name, range(100)), "", {}),
        "raw": (lambda name: raw_file(folder / f"{name}.bin"), ".bin", {"format": "raw", "dtype": "uint16"}),
        "ds": (lambda name: ds_file(folder / f"{name}.ds"), ".ds", {"format": "ds"}),
        "presequenced": (
            lambda name: raw_file(folder / f"{name}.seq", range(17 * 6)),
            ".seq",
            {"format": "presequenced", "dtype": "uint16"},
        ),
    }


def inventory(tmp_path, **datasets):
    raw = training.changed(training.two_stages(tmp_path, tmp_path), datasets=datasets)
    raw["datasets"] = datasets
    mix = {name: 1.0 for name, table in datasets.items() if "train" in table or "domains" in table}
    raw["stages"] = [{"name": "one", "dataset": mix, "steps": 1, "lr": {"schedule": "constant", "max": 1e-3}}]
    return take_inventory(training.config_of(raw))


@pytest.mark.parametrize("name", formats(None))
@pytest.mark.parametrize("way", ["glob", "link", "spelling", "same"])
def test_training_data_that_includes_the_validation_data_is_refused(tmp_path, name, way):
    """In every format: by a glob, through a link, in another spelling, or the same list."""
    write, ending, keys = formats(tmp_path / "tok")[name]
    write("a")
    write("held")
    held = tmp_path / "tok" / f"held{ending}"
    for old in (tmp_path / "tok").glob("held*"):
        (tmp_path / f"soft{old.name.removeprefix('held')}").symlink_to(old)
    validation = {
        "glob": held,
        "same": held,
        "link": tmp_path / f"soft{ending}",
        "spelling": f"{tmp_path}/tok/../tok/held{ending}",
    }[way]
    train = held if way == "same" else f"{tmp_path}/tok/*{ending}"
    table = {"train": str(train), "validation": str(validation), **keys}

    with pytest.raises(
        DataError, match=r"datasets\.en\.train: includes .*held.*, which datasets\.en\.validation measu"
    ):
        inventory(tmp_path, en=table)
    assert inventory(tmp_path, en=table | {"train": str(tmp_path / "tok" / f"a{ending}")}).tokens["en"] >= 100


def test_validation_on_the_bin_of_a_training_pair_is_refused(tmp_path):
    """A pair and format = "raw" read the same x.bin."""
    pair(tmp_path / "x", range(100))
    table = {"train": str(tmp_path / "x"), "validation": str(tmp_path / "x.bin")}

    with pytest.raises(DataError, match=r"includes .*x\.bin, which datasets\.en\.validation measures"):
        inventory(tmp_path, en={**table, "validation_format": "raw", "dtype": "uint16"})


def test_training_on_the_validation_data_of_another_dataset_or_domain_is_refused(tmp_path):
    """What a dataset keeps apart is not to be trained on by another one, nor by its own domains."""
    for name in ("a", "b", "held"):
        pair(tmp_path / name, range(100))
    a, b, held = (str(tmp_path / name) for name in ("a", "b", "held"))

    with pytest.raises(DataError, match=r"datasets\.en\.train: includes .*held\.bin, which datasets\.de\.validation"):
        inventory(tmp_path, en={"train": [a, held]}, de={"train": b, "validation": held})
    domains = {"one": {"train": a, "weight": 1.0}, "two": {"train": held, "weight": 1.0}}
    with pytest.raises(DataError, match=r"datasets\.en\.domains\.two\.train: includes .*datasets\.en\.validation"):
        inventory(tmp_path, en={"domains": domains, "validation": held})


def test_files_shared_by_datasets_are_noted(tmp_path):
    """Two datasets may read the same file, and a validation-only dataset may measure training data."""
    for name in ("a", "b"):
        pair(tmp_path / name, range(100))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    alone = inventory(tmp_path, en={"train": a}, de={"train": b}).notes
    shared = inventory(tmp_path, en={"train": [a, b]}, de={"train": b}).notes
    measured = inventory(tmp_path, en={"train": [a, b]}, seen={"validation": b}).notes

    assert alone == ()
    assert shared == (
        f"datasets.en.train and datasets.de.train both read {b}.bin: replay, epochs and forgetting treat it as "
        "different data",
    )
    assert measured == (
        f"datasets.seen.validation: measures {b}.bin, which datasets.en.train trains on: it is not unseen data",
    )


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            "raw/a.jsonl",
            r"en\.train: raw/a\.jsonl is text, not tokens: tokenize it with .* or set source = ",
        ),
        ("raw/a.txt.zst", r"raw/a\.txt\.zst is text, not tokens"),
        ("pairs", r"datasets\.en\.train: pairs is a folder: write pairs/\* for all its files, or name one file"),
        ("pairs/", r"pairs/ is a folder: write pairs/\* for all"),
    ],
)
def test_text_files_and_folders_instead_of_tokens_are_refused(tmp_path, monkeypatch, train, message):
    """The plan would otherwise treat them as data that does not exist yet."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "a.txt.zst"):
        text_file(tmp_path / "raw" / name)
    pair(tmp_path / "pairs" / "x")

    with pytest.raises(DataError, match=message):
        inventory(tmp_path, en={"train": train})


def test_a_folder_of_text_and_a_prefix_may_have_the_same_name(tmp_path, monkeypatch):
    """data/german/*.txt may be prepared into data/german.bin: until then the tokens do not exist yet."""
    monkeypatch.chdir(tmp_path)
    text_file(tmp_path / "data" / "german" / "a.txt")

    assert inventory(tmp_path, en={"train": "data/german"}).tokens == {"en": None}
    table = {"train": "data/german/a.txt", "source": {"text": "data/german/a.txt"}}
    assert inventory(tmp_path, en=table).tokens == {"en": None}


def test_validation_data_is_counted_and_checked_with_the_plan(tmp_path):
    """From the headers: damage and sequences of another length, which training would refuse."""
    pair(tmp_path / "a", range(100))
    pair(tmp_path / "held", range(40))
    table = {"train": str(tmp_path / "a"), "validation": str(tmp_path / "held")}
    assert inventory(tmp_path, en=table).validation_tokens == {"en": 40}
    assert inventory(tmp_path, en=table | {"validation": str(tmp_path / "no")}).validation_tokens == {"en": None}

    with pytest.raises(DataError, match=r"datasets\.en\.validation: .*held: has sequences of 40 tokens; allowed is"):
        inventory(tmp_path, en=table | {"validation_format": "presequenced"})
    (tmp_path / "held.idx").write_bytes(b"short")
    with pytest.raises(DataError, match=r"datasets\.en\.validation: .*held\.idx: 5 bytes"):
        inventory(tmp_path, en=table)


def test_existing_files_are_not_missing(tmp_path):
    """The paths of an entry whose files all exist are the files that are opened."""
    pair(tmp_path / "a")
    files = TokenFiles((f"{tmp_path}/*",))

    assert (missing_entries(files), resolve_paths(files)) == ([], [tmp_path / "a"])


def test_missing_initial_weights_are_noted(tmp_path, monkeypatch):
    """A missing checkpoint, a folder without a manifest, and a name that only the hub may know."""
    monkeypatch.chdir(tmp_path)
    pair(tmp_path / "a", range(100))
    (tmp_path / "folder").mkdir()

    def notes(init):
        raw = training.two_stages(tmp_path, tmp_path)
        raw["datasets"] = {"en": {"train": "a"}}
        lr = {"schedule": "constant", "max": 1e-3}
        raw["stages"] = [{"name": "one", "dataset": "en", "steps": 1, "init": init, "lr": lr}]
        return take_inventory(training.config_of(raw)).notes

    assert notes("checkpoint:nowhere") == (
        "stages.one.init: nowhere does not exist yet; training stops before this stage if it is still missing",
    )
    assert "stages.one.init: folder has no manifest.json" in notes("checkpoint:folder")[0]
    assert notes("hf:nowhere") == (
        "stages.one.init: nowhere is not a local folder; it is loaded from the Hugging Face hub",
    )
    assert notes("hf:folder") == notes("random") == ()


@pytest.mark.parametrize("name", formats(None))
def test_unreadable_tokens_are_refused_by_the_plan(tmp_path, name):
    """The plan itself needs only the length of a .bin, which needs no read permission."""
    write, ending, keys = formats(tmp_path / "tok")[name]
    write("a")
    closed = tmp_path / "tok" / f"a{ending or '.bin'}"
    closed.chmod(0)
    with modes_count(), pytest.raises(DataError, match=rf"datasets\.a\.train: {closed}: cannot be read: Permission"):
        inventory(tmp_path, a={"train": f"{tmp_path}/tok/a{ending}", **keys})


@pytest.mark.parametrize("format_", ["presequenced", "raw"])
def test_a_dataset_is_counted_in_the_length_of_the_stage_that_draws_from_it(tmp_path, format_):
    """102 tokens are six sequences of 16 + 1 or two of 50 + 1; only a presequenced file defines them."""
    raw_file(tmp_path / "x.bin", range(102))
    table = {"train": str(tmp_path / "x.bin"), "format": format_, "dtype": "uint16"}

    def taken(seq_len):
        raw = training.changed(training.two_stages(tmp_path, tmp_path), datasets={"x": table})
        raw["datasets"] = {"x": table}
        lr = {"schedule": "constant", "max": 1e-3}
        raw["stages"] = [{"name": "one", "dataset": "x", "steps": 1, "seq_len": seq_len, "lr": lr}]
        return take_inventory(training.config_of(raw))

    counted = {length: {("x", length): 102 // (length + 1)} for length in (16, 50)}
    if format_ == "raw":
        assert taken(50).sequences == {}
        return
    assert (taken(16).sequences, taken(50).sequences) == (counted[16], counted[50])
    with pytest.raises(
        DataError, match=r"not a multiple of stages\.one\.seq_len \+ 1 = 41 .*: set stages\.one\.seq_len to"
    ):
        taken(40)
