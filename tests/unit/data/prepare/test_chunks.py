"""Where text is cut into chunks: by its content, whatever the blocks in which it is read."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prepared import jsonl, words

from titan_cpt.data.prepare import chunks
from titan_cpt.data.prepare.chunks import read_chunks
from titan_cpt.data.prepare.text_inputs import find_inputs
from titan_cpt.errors import DataError


@settings(max_examples=100, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=60).map(lambda line: line.replace(b"\n", b" ")), min_size=1, max_size=40),
    cuts=st.lists(st.integers(1, 200), max_size=30),
    target=st.integers(1, 300),
)
@example(lines=[b"\xef\xbb\xbf"], cuts=[1], target=1)
def test_chunk_borders_depend_only_on_the_content(lines, cuts, target):
    """Blocks of any lengths give the same chunks: whole lines with their numbers."""
    content = b"\n".join(lines) + b"\nlast"
    blocks, start = [], 0
    for cut in [*cuts, len(content)]:
        blocks.append((content[start : start + cut], start))
        start += cut

    cut_once = list(chunks._cut_lines("x", iter(blocks), target))
    again = list(chunks._cut_lines("x", iter([(content, len(content))]), target))
    contents = [bytes(chunk.content) for chunk in cut_once]
    assert cut_once == again
    assert b"".join(contents).removeprefix(b"\xef\xbb\xbf") == content.removeprefix(b"\xef\xbb\xbf")
    assert all(part.endswith(b"\n") for part in contents[:-1])
    assert all(len(part) <= target or b"\n" not in part[:-1] for part in contents)
    assert [chunk.first for chunk in cut_once] == [
        1 + b"".join(contents[:number]).count(b"\n") for number in range(len(cut_once))
    ]


@settings(max_examples=200, deadline=None)
@given(
    content=st.lists(st.sampled_from([b"\n", b" ", b"a", b"\xef\xbb\xbf", b"bcd" * 20]), min_size=1, max_size=60),
    target=st.integers(1, 100),
    searched=st.integers(1, 50),
)
def test_an_uncompressed_file_is_cut_as_its_content_is(tmp_path_factory, content, target, searched):
    """Ranges of the file with the same lines and numbers as the chunks of a compressed file."""
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.write_bytes(b"".join(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "SEARCHED_BYTES", searched)
        ranges = list(chunks._cut_file(str(path), target))
    blocks = list(chunks._cut_lines(str(path), iter([(path.read_bytes(), 0)]), target))

    assert [chunk.loaded().content for chunk in ranges] == [chunk.content for chunk in blocks]
    assert [chunk._place(2) for chunk in ranges] == [chunk._place(2) for chunk in blocks]
    assert [chunk.loaded().digest() for chunk in ranges] == [chunk.digest() for chunk in blocks]


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(tmp_path, small_chunks):
    """A document must not be cut silently."""
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl(words(300)))
    found = list(read_chunks(find_inputs([str(path)]), "text"))
    path.write_text(jsonl(words(100)))

    assert len(list(found[0].loaded().texts("text"))) > 0
    with pytest.raises(DataError, match=r"a\.jsonl: became shorter while it was read; start the run again"):
        found[-1].loaded()


def test_the_chunk_size_depends_on_the_size_of_the_file(tmp_path, monkeypatch):
    """About 64 per file within the bounds, however many workers there are."""
    monkeypatch.setattr(chunks, "SMALLEST_CHUNK_BYTES", 100)
    (tmp_path / "a.jsonl").write_text(jsonl(words(2000)))

    assert 60 <= len(list(read_chunks(find_inputs([str(tmp_path / "a.jsonl")]), "text"))) <= 70
