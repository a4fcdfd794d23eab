"""Names, globs and lists become files: each once, whatever it is called, and as fast for many as for few."""

import os
import time

import numpy as np
import pytest
import training
from permissions import modes_count

from titan_cpt.data.file_names import expand_glob
from titan_cpt.data.formats.indexed import find_prefixes
from titan_cpt.data.formats.indexed_writer import IndexedWriter
from titan_cpt.data.formats.raw import find_files
from titan_cpt.data.formats.token_files import TokenFiles, missing_entries, resolve_paths
from titan_cpt.data.inventory import take_inventory
from titan_cpt.data.prepare.text_inputs import find_inputs
from titan_cpt.errors import DataError

KINDS = {
    "pairs": (find_prefixes, ("", ".bin", ".idx")),
    "files": (find_files, ("",)),
    "texts": (find_inputs, ("",)),
}


def pair(prefix, tokens=(1, 2, 3)):
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(prefix, 300) as writer:
        writer.add_document(list(tokens))
    return prefix


def put(kind, path):
    """What the reader of that kind can find under the name `path`."""
    if kind == "pairs":
        return pair(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("words\n")
    return path


def link(kind, old, new, how=os.symlink):
    """The same content under another name."""
    for suffix in (".bin", ".idx") if kind == "pairs" else ("",):
        how(f"{old}{suffix}", f"{new}{suffix}")
    return new


def names(kind, spec):
    return [str(each.spec) if kind == "texts" else str(each) for each in KINDS[kind][0](spec)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_under_another_name_is_the_same_file(tmp_path, kind, monkeypatch):
    """Its name again, two spellings, a symbolic link, a hard link, a linked folder, and a relative name."""
    monkeypatch.chdir(tmp_path)
    first = put(kind, tmp_path / "d" / "x.txt")
    (tmp_path / "linked").symlink_to(tmp_path / "d")
    again = [
        first,
        f"{tmp_path}/d/../d/x.txt",
        f"{tmp_path}//d/./x.txt",
        "d/x.txt",
        link(kind, first, tmp_path / "soft.txt"),
        link(kind, first, tmp_path / "hard.txt", os.link),
        tmp_path / "linked" / "x.txt",
    ]

    for name in again:
        with pytest.raises(DataError, match=r"x\.txt.* a second time|(soft|hard)\.txt a second time \(before as"):
            KINDS[kind][0]([str(first), str(name)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_and_a_name_that_differs_are_other_files(tmp_path, kind):
    """The same bytes in two files may be meant; a link from one glob into itself is not read twice in silence."""
    put(kind, tmp_path / "a.txt")
    put(kind, tmp_path / "b.txt")

    assert names(kind, [f"{tmp_path}/*.txt"]) == [f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"]
    link(kind, tmp_path / "a.txt", tmp_path / "c.txt")
    with pytest.raises(DataError, match=r"c\.txt a second time \(before as .*a\.txt\)"):
        names(kind, [f"{tmp_path}/*.txt"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_glob_finds_files_in_a_folder_called_like_a_glob(tmp_path, kind):
    """`[v2]` is taken literally where it is there and nothing else matches; escaped, it is always literal."""
    put(kind, tmp_path / "[v2]" / "sub" / "a.txt")

    for pattern in (f"{tmp_path}/[v2]/*/*.txt", f"{tmp_path}/[[]v2]/sub/a*", f"{tmp_path}/[v2]/sub/[a]*"):
        assert names(kind, [pattern]) == [f"{tmp_path}/[v2]/sub/a.txt"]
    with pytest.raises(DataError, match=r"write \[\*\], \[\?\] and \[\[\] for the literal characters"):
        names(kind, [f"{tmp_path}/[v2]/*.nothing"])
    put(kind, tmp_path / "v" / "sub" / "a.txt")
    assert names(kind, [f"{tmp_path}/[v2]/*/*.txt"]) == [f"{tmp_path}/v/sub/a.txt"], "what a glob means comes first"


def test_a_name_without_glob_characters_matches_nothing_as_a_glob(tmp_path):
    """A literal name is looked for as it stands, by whoever asks."""
    put("files", tmp_path / "a.txt")

    assert expand_glob(f"{tmp_path}/a.txt") == []
    with pytest.raises(DataError) as refusal:
        find_files([f"{tmp_path}/b.txt"])
    assert "glob characters" not in str(refusal.value)


@pytest.mark.parametrize("kind", KINDS)
def test_many_files_take_a_time_in_proportion(tmp_path, kind):
    """6,000 files: half a second of this process and not the eight of a comparison of each with all others."""
    source = put(kind, tmp_path / "source")
    for number in range(6000):
        for suffix in (".bin", ".idx") if kind == "pairs" else ("",):
            with open(f"{source}{suffix}", "rb") as content, open(f"{tmp_path}/{number}.txt{suffix}", "wb") as copy:
                copy.write(content.read())
    began = time.process_time()

    assert len(names(kind, [f"{tmp_path}/*.txt"])) == 6000
    assert len(names(kind, [f"{tmp_path}/{number}.txt" for number in range(6000)])) == 6000
    assert time.process_time() - began < 3


# What a plan says of a config's files


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
    """In every format, by a glob, through a link, in another spelling, and the whole of it."""
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


def test_validation_of_a_pair_read_as_bare_ids_is_the_same_file(tmp_path):
    """x.bin is what both a pair and format raw read."""
    pair(tmp_path / "x", range(100))
    table = {"train": str(tmp_path / "x"), "validation": str(tmp_path / "x.bin")}

    with pytest.raises(DataError, match=r"includes .*x\.bin, which datasets\.en\.validation measures"):
        inventory(tmp_path, en={**table, "validation_format": "raw", "dtype": "uint16"})


def test_validation_of_another_dataset_or_domain_is_refused_too(tmp_path):
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
    """Two datasets may read the same file, and one may be there to measure what is trained on: the plan says so."""
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
def test_text_and_folders_in_the_place_of_tokens_are_refused(tmp_path, monkeypatch, train, message):
    """They would be waited for as data that is not there yet."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "a.txt.zst"):
        put("files", tmp_path / "raw" / name)
    pair(tmp_path / "pairs" / "x")

    with pytest.raises(DataError, match=message):
        inventory(tmp_path, en={"train": train})


def test_a_folder_of_text_and_a_prefix_of_its_name_go_together(tmp_path, monkeypatch):
    """data/german/*.txt may be prepared into data/german.bin: until then the tokens are not there yet."""
    monkeypatch.chdir(tmp_path)
    put("files", tmp_path / "data" / "german" / "a.txt")

    assert inventory(tmp_path, en={"train": "data/german"}).tokens == {"en": None}
    table = {"train": "data/german/a.txt", "source": {"text": "data/german/a.txt"}}
    assert inventory(tmp_path, en=table).tokens == {"en": None}


def test_validation_data_is_counted_and_checked_with_the_plan(tmp_path):
    """What training would refuse on opening, from the headers: damage and sequences of another length."""
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


def test_files_are_looked_for_once_each(tmp_path):
    """An entry whose every file is there is not absent, and its files are those that are opened."""
    pair(tmp_path / "a")
    files = TokenFiles((f"{tmp_path}/*",))

    assert (missing_entries(files), resolve_paths(files)) == ([], [tmp_path / "a"])


def test_weights_that_are_not_there_are_noted(tmp_path, monkeypatch):
    """A checkpoint that is missing, a folder that is none, and a name that only the hub may know."""
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
def test_tokens_that_may_not_be_read_are_refused_before_training_opens_them(tmp_path, name):
    """A plan needs only the length of a .bin, which the folder tells."""
    write, ending, keys = formats(tmp_path / "tok")[name]
    write("a")
    closed = tmp_path / "tok" / f"a{ending or '.bin'}"
    closed.chmod(0)
    with modes_count(), pytest.raises(DataError, match=rf"datasets\.a\.train: {closed}: cannot be read: Permission"):
        inventory(tmp_path, a={"train": f"{tmp_path}/tok/a{ending}", **keys})
