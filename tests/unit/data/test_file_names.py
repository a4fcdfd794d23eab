"""Names, globs and lists of files: each file once, whatever its name, in linear time."""

import os
import time

import pytest

from titan_cpt.data.file_names import expand_glob
from titan_cpt.data.formats.indexed import find_prefixes
from titan_cpt.data.formats.indexed_writer import IndexedWriter
from titan_cpt.data.formats.raw import find_files
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
    """Write a file of that kind at `path`."""
    if kind == "pairs":
        return pair(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("words\n")
    return path


def link(kind, old, new, how=os.symlink):
    """Give the file another name."""
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
def test_a_copy_is_another_file(tmp_path, kind):
    """The same bytes in two files may be intended; a link from one glob into itself is an error."""
    put(kind, tmp_path / "a.txt")
    put(kind, tmp_path / "b.txt")

    assert names(kind, [f"{tmp_path}/*.txt"]) == [f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"]
    link(kind, tmp_path / "a.txt", tmp_path / "c.txt")
    with pytest.raises(DataError, match=r"c\.txt a second time \(before as .*a\.txt\)"):
        names(kind, [f"{tmp_path}/*.txt"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_glob_finds_files_in_a_folder_whose_name_has_glob_characters(tmp_path, kind):
    """`[v2]` is taken literally if it exists and nothing else matches; escaped, it is always literal."""
    put(kind, tmp_path / "[v2]" / "sub" / "a.txt")

    for pattern in (f"{tmp_path}/[v2]/*/*.txt", f"{tmp_path}/[[]v2]/sub/a*", f"{tmp_path}/[v2]/sub/[a]*"):
        assert names(kind, [pattern]) == [f"{tmp_path}/[v2]/sub/a.txt"]
    with pytest.raises(DataError, match=r"write \[\*\], \[\?\] and \[\[\] for the literal characters"):
        names(kind, [f"{tmp_path}/[v2]/*.nothing"])
    put(kind, tmp_path / "v" / "sub" / "a.txt")
    assert names(kind, [f"{tmp_path}/[v2]/*/*.txt"]) == [f"{tmp_path}/v/sub/a.txt"], "what a glob means comes first"


def test_a_name_without_glob_characters_matches_nothing_as_a_glob(tmp_path):
    """The caller looks for a literal name itself."""
    put("files", tmp_path / "a.txt")

    assert expand_glob(f"{tmp_path}/a.txt") == []
    with pytest.raises(DataError) as refusal:
        find_files([f"{tmp_path}/b.txt"])
    assert "glob characters" not in str(refusal.value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_time_for_many_files_is_linear(tmp_path, kind):
    """6,000 files take half a second; comparing each with all others took eight."""
    source = put(kind, tmp_path / "source")
    for number in range(6000):
        for suffix in (".bin", ".idx") if kind == "pairs" else ("",):
            with open(f"{source}{suffix}", "rb") as content, open(f"{tmp_path}/{number}.txt{suffix}", "wb") as copy:
                copy.write(content.read())
    began = time.process_time()

    assert len(names(kind, [f"{tmp_path}/*.txt"])) == 6000
    assert len(names(kind, [f"{tmp_path}/{number}.txt" for number in range(6000)])) == 6000
    assert time.process_time() - began < 3
