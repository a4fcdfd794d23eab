"""Megatron's .bin/.idx pairs: what is written is read again, and damage is an error that names the file."""

import os
import pickle
import struct
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from titan_cpt.data.formats import indexed, indexed_layout
from titan_cpt.data.formats.indexed import IndexedTokens, TokenStream, count_tokens, find_prefixes, missing_prefixes
from titan_cpt.data.formats.indexed_writer import IndexedWriter, concatenate
from titan_cpt.errors import DataError

REUSED_FOLDER = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 300) -> Path:
    with IndexedWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def packed(code: int, dtype: str, documents: list[list[int]]) -> tuple[bytes, bytes]:
    """The .bin and the .idx of documents, put together by hand from the layout that Megatron documents."""
    width = np.dtype(dtype).itemsize
    sizes = [len(document) for document in documents]
    pointers = [width * sum(sizes[:number]) for number in range(len(sizes))]
    count = len(sizes)
    idx = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, count, count + 1)
    idx += struct.pack(f"<{count}i", *sizes) + struct.pack(f"<{count}q", *pointers)
    idx += struct.pack(f"<{count + 1}q", *range(count + 1))
    return np.array([token for document in documents for token in document], dtype=dtype).tobytes(), idx


def damage(path: Path, offset: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(content)


@pytest.mark.parametrize(("vocab_size", "code", "dtype"), [(65_499, 8, "<u2"), (65_500, 4, "<i4")])
def test_a_written_pair_has_the_bytes_of_megatrons_layout(tmp_path, vocab_size, code, dtype):
    """uint16 below a vocabulary of 65,500 and int32 from there, byte for byte."""
    documents = [[1, 2, 65_498], [7], [4, 5]]
    write(tmp_path / "x", documents, vocab_size)

    assert ((tmp_path / "x.bin").read_bytes(), (tmp_path / "x.idx").read_bytes()) == packed(code, dtype, documents)


@pytest.mark.parametrize(("code", "dtype"), [(1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_every_number_type_is_read(tmp_path, code, dtype):
    """All six types that writers agree on."""
    content, index = packed(code, dtype, [[3, 1], [], [127]])
    (tmp_path / "x.bin").write_bytes(content)
    (tmp_path / "x.idx").write_bytes(index)

    tokens = IndexedTokens(tmp_path / "x", vocab_size=128)

    assert (tokens.read(0, 3).tolist(), tokens.read(0, 3).dtype) == ([3, 1, 127], np.int64)
    assert (tokens.tokens, tokens.sequences, count_tokens(tmp_path / "x")) == (3, 3, 3)


@REUSED_FOLDER
@given(
    shards=st.lists(st.lists(st.lists(st.integers(0, 299), max_size=9), max_size=5), min_size=1, max_size=4),
    data=st.data(),
)
def test_any_window_of_a_stream_is_the_slice_of_its_documents(tmp_path, shards, data):
    """Windows may straddle files, documents and empty files."""
    prefixes = [write(tmp_path / f"s{number}", documents) for number, documents in enumerate(shards)]
    flat = [token for documents in shards for document in documents for token in document]
    start = data.draw(st.integers(0, len(flat)))
    count = data.draw(st.integers(0, len(flat) - start))

    stream = TokenStream(prefixes, 300)

    assert stream.tokens == len(flat) == sum(map(count_tokens, prefixes))
    assert stream.read(start, count).tolist() == flat[start : start + count]


@REUSED_FOLDER
@given(shards=st.lists(st.lists(st.lists(st.integers(0, 299), max_size=9), max_size=5), min_size=1, max_size=4))
def test_concatenated_shards_equal_the_output_of_one_writer(tmp_path, shards):
    """Both files, byte for byte."""
    prefixes = [write(tmp_path / f"s{number}", documents) for number, documents in enumerate(shards)]
    write(tmp_path / "whole", [document for documents in shards for document in documents])
    concatenate(prefixes, tmp_path / "joined", 300)

    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"joined{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_reading_past_either_end_is_refused(tmp_path):
    """A window is never shorter than requested."""
    stream = TokenStream([write(tmp_path / "x", [[1, 2, 3]])])

    for start, count in [(-1, 1), (0, 4), (3, 1), (2, -1)]:
        with pytest.raises(IndexError):
            stream.read(start, count)


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_a_file_of_any_other_length_is_a_data_error(tmp_path, suffix):
    """The check on open and the count for the plan accept only the right length."""
    prefix = write(tmp_path / "x", [[1, 2, 3], [4], [5, 6]])
    whole = (tmp_path / f"x{suffix}").read_bytes()

    for length in [*range(len(whole)), len(whole) + 1]:
        (tmp_path / f"x{suffix}").write_bytes((whole + b"\x00")[:length])
        with pytest.raises(DataError, match=r"x\.(idx|bin)"):
            IndexedTokens(prefix)
        with pytest.raises(DataError, match=r"x\.(idx|bin)"):
            count_tokens(prefix)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"TNTIDX", "another format"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x06", "dtype code 6.*disagree.*allowed are"),
        (17, b"\x07", "dtype code 7"),
        (17, b"\x00", "dtype code 0"),
        (17, b"\x04", "of the .bin"),  # int32 where uint16 was written
        (18, struct.pack("<Q", 2**63), "the 9223372036854775808 sequences"),
        (26, struct.pack("<Q", 2**61), "document indices take"),
        (34, struct.pack("<i", 4), "sequence 0 has 4 tokens"),
        (34, struct.pack("<ii", 5, -1), "sequence 0 has 5 tokens"),
        (34, struct.pack("<ii", -1, 5), "sequence 0 has -1 tokens"),
        (34, struct.pack("<iiiqqq", 4, -1, 3, 0, 8, 6), "sequence 1 has -1 tokens"),  # adds up all the same
        (46, struct.pack("<q", 2), "first sequence begins at byte 2"),
        (54, struct.pack("<q", 4), "sequence 0 has 3 tokens from byte 0 .* begins at byte 4"),
        (62, struct.pack("<q", 2**62), "sequence 1"),
        (70, struct.pack("<q", 1), "document indices"),
        (78, struct.pack("<q", 3), "document indices"),
        (94, struct.pack("<q", 4), "document indices"),
    ],
)
def test_damage_in_each_field_of_the_index_is_named(tmp_path, offset, value, message):
    """The message has the value that was found."""
    prefix = write(tmp_path / "x", [[1, 2, 3], [4], [5, 6]])
    damage(tmp_path / "x.idx", offset, value)

    with pytest.raises(DataError, match=message):
        IndexedTokens(prefix)


@REUSED_FOLDER
@given(offset=st.integers(0, 101), flip=st.integers(1, 255))
def test_one_wrong_byte_in_the_index_is_refused_or_harmless(tmp_path, offset, flip):
    """A DataError or the same tokens; never another exception or other tokens."""
    prefix = write(tmp_path / "x", [[1, 2, 3], [4], [5, 6]])
    damage(tmp_path / "x.idx", offset, bytes([(tmp_path / "x.idx").read_bytes()[offset] ^ flip]))

    try:
        found = IndexedTokens(prefix).read(0, 6).tolist()
    except DataError:
        found = None
    assert found in (None, [1, 2, 3, 4, 5, 6])
    assert found is None or offset >= 70  # the first document index and those behind it


def test_damage_at_the_border_of_two_blocks_is_found(tmp_path, monkeypatch):
    """A large index is checked across the borders of blocks; a huge one at least at its ends."""
    prefix = write(tmp_path / "x", [[1]] * 200_000)
    header = indexed_layout.read_header(tmp_path / "x.idx")
    IndexedTokens(prefix)
    whole = (tmp_path / "x.idx").read_bytes()
    damage(tmp_path / "x.idx", header.pointer_at(65_536), struct.pack("<q", 65_536 * 2 + 2))
    with pytest.raises(DataError, match="sequence 65535"):
        IndexedTokens(prefix)
    (tmp_path / "x.idx").write_bytes(whole)
    damage(tmp_path / "x.idx", header.document_at(65_536), struct.pack("<q", 65_534))
    with pytest.raises(DataError, match="document indices"):
        IndexedTokens(prefix)
    (tmp_path / "x.idx").write_bytes(whole)
    monkeypatch.setattr(indexed_layout, "FULL_CHECK_SEQUENCES", 1000)
    damage(tmp_path / "x.idx", header.pointer_at(199_999), struct.pack("<q", 2))

    with pytest.raises(DataError, match="sequence 199998"):
        IndexedTokens(prefix)


def test_an_id_outside_the_vocabulary_is_found_on_open_with_its_position(tmp_path):
    """The message has the file, the position, the id and the allowed range."""
    prefix = write(tmp_path / "x", [[1, 2], [3, 299, 4]])
    IndexedTokens(prefix, vocab_size=300)

    with pytest.raises(DataError, match=r"x\.bin: token 3 has id 299; allowed are ids from 0 to 298"):
        IndexedTokens(prefix, vocab_size=299)


def test_negative_ids_are_refused(tmp_path):
    """int32 data with -1 in it."""
    content, index = packed(4, "<i4", [[5, -1]])
    (tmp_path / "x.bin").write_bytes(content)
    (tmp_path / "x.idx").write_bytes(index)

    with pytest.raises(DataError, match="token 1 has id -1"):
        TokenStream([tmp_path / "x"], 300)


def test_an_id_that_the_scan_on_open_skips_is_found_when_it_is_read(tmp_path, monkeypatch):
    """Large files are scanned in blocks; each window is checked when it is read."""
    monkeypatch.setattr(indexed, "FULL_SCAN_TOKENS", 1000)
    tokens = [1] * 300_000
    tokens[100_000] = 299
    stream = TokenStream([write(tmp_path / "x", [tokens])], 299)

    assert stream.read(0, 100_000).tolist() == tokens[:100_000]
    with pytest.raises(DataError, match="token 100000 has id 299"):
        stream.read(99_990, 20)


@pytest.mark.parametrize("place", [0, 299_999])
def test_the_scan_in_blocks_covers_both_ends(tmp_path, monkeypatch, place):
    """An id out of range in the first or the last token is found on open however large the file."""
    monkeypatch.setattr(indexed, "FULL_SCAN_TOKENS", 1000)
    tokens = [1] * 300_000
    tokens[place] = 299
    write(tmp_path / "x", [tokens])

    with pytest.raises(DataError, match=f"token {place} has id 299"):
        TokenStream([tmp_path / "x"], 299)


def test_a_bin_that_changes_while_it_is_open_is_a_data_error(tmp_path):
    """The process does not crash and reads no other tokens; a new modification time is fine."""
    prefix = write(tmp_path / "x", [list(range(100))])
    stream = TokenStream([prefix])
    assert stream.read(90, 5).tolist() == [90, 91, 92, 93, 94]
    os.utime(tmp_path / "x.bin", ns=(1, 1))
    assert stream.read(90, 5).tolist() == [90, 91, 92, 93, 94]
    os.truncate(tmp_path / "x.bin", 20)
    with pytest.raises(DataError, match="20 bytes, but 200 when this run opened it"):
        stream.read(90, 5)
    write(prefix, [list(range(100))])
    stream = TokenStream([prefix])
    with open(tmp_path / "x.bin", "r+b") as file:
        file.write(b"\x05\x00")
    os.utime(tmp_path / "x.bin", ns=(2, 2))

    with pytest.raises(DataError, match="other tokens were written to it"):
        stream.read(90, 5)


def _read_all(stream: TokenStream) -> list[int]:
    return stream.read(0, stream.tokens).tolist()


def test_a_stream_can_be_pickled_and_sent_to_workers(tmp_path):
    """Also after a read; data-loader workers receive it by pickle."""
    stream = TokenStream([write(tmp_path / "a", [[1, 2]]), write(tmp_path / "b", [[3]])], 300)
    assert _read_all(stream) == [1, 2, 3]
    assert _read_all(pickle.loads(pickle.dumps(stream))) == [1, 2, 3]

    with get_context("spawn").Pool(1) as pool:
        assert pool.apply(_read_all, (stream,)) == [1, 2, 3]


def test_more_files_than_the_limit_of_open_files_are_read(tmp_path, monkeypatch):
    """The number of open files stays bounded, whatever the number of files."""
    monkeypatch.setattr(indexed, "OPEN_FILES", 3)
    stream = TokenStream([write(tmp_path / f"s{number}", [[number]]) for number in range(20)])
    before = len(os.listdir("/proc/self/fd"))

    assert _read_all(stream) == _read_all(stream) == list(range(20))
    assert len(os.listdir("/proc/self/fd")) - before <= 3


def test_the_fingerprint_depends_on_the_tokens_and_not_on_the_path(tmp_path):
    """A copy has the same one; another token, file order or division into files has another."""
    (tmp_path / "elsewhere").mkdir()
    same = [write(tmp_path / name, [[1, 2, 3]]) for name in ("x", "elsewhere/y")]
    prints = [TokenStream([prefix]).fingerprint() for prefix in same]
    other = write(tmp_path / "z", [[1, 2, 4]])
    assert prints[0] == prints[1]

    streams = ([same[0]], [other], [same[0], other], [other, same[0]])
    assert len({TokenStream(prefixes).fingerprint() for prefixes in streams}) == 4


def test_an_interrupted_writer_leaves_no_files(tmp_path):
    """Neither .bin nor .idx nor a temporary file."""

    def interrupted() -> None:
        with IndexedWriter(tmp_path / "x", 300) as writer:
            writer.add_document([1, 2])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert list(tmp_path.iterdir()) == []


def test_a_pair_does_not_exist_before_its_writer_is_closed(tmp_path):
    """A killed process cannot clean up: its files must not look like data."""
    writer = IndexedWriter(tmp_path / "x", 300)
    writer.add_document([1, 2])
    assert missing_prefixes(str(tmp_path / "*")) == [str(tmp_path / "*")]
    writer.close()

    assert find_prefixes(str(tmp_path / "*")) == [tmp_path / "x"]


@pytest.mark.parametrize("token", [-1, 300])
def test_the_writer_refuses_ids_outside_the_vocabulary(tmp_path, token):
    """uint16 would wrap them to other ids."""
    with pytest.raises(DataError, match=f"id {token}; allowed are ids from 0 to 299"):
        write(tmp_path / "x", [[1, token]])


def test_shards_of_different_dtypes_are_not_concatenated(tmp_path):
    """int32 and uint16 in one .bin would be garbage."""
    shards = [write(tmp_path / "a", [[1]], 300), write(tmp_path / "b", [[1]], 70_000)]

    with pytest.raises(DataError, match=r"b: has dtype int32, not uint16"):
        concatenate(shards, tmp_path / "c", 300)


def test_specs_name_prefixes_globs_and_lists(tmp_path):
    """Globs are sorted, lists keep their order, a prefix may contain dots and glob characters."""
    for name in ("b", "a", "v1.5", "odd[1]"):
        write(tmp_path / name, [[1]])
    at = str(tmp_path)

    assert find_prefixes(f"{at}/[ab]") == [tmp_path / "a", tmp_path / "b"]
    assert find_prefixes([f"{at}/b", f"{at}/a"]) == [tmp_path / "b", tmp_path / "a"]
    assert find_prefixes(f"{at}/v1.5") == [tmp_path / "v1.5"]
    assert find_prefixes(f"{at}/odd[1]") == [tmp_path / "odd[1]"]
    assert missing_prefixes([f"{at}/a", f"{at}/c", f"{at}/d*"]) == [f"{at}/c", f"{at}/d*"]


def test_invalid_specs_are_refused(tmp_path):
    """No match, half a pair, a pair named twice, and a glob that includes the validation data."""
    for name in ("a", "a-validation", "half"):
        write(tmp_path / name, [[1]])
    (tmp_path / "half.bin").unlink()
    at = str(tmp_path)

    for spec, message in [
        (f"{at}/none", "no .bin/.idx pair"),
        ([], "list of .* is empty"),
        (f"{at}/half", "half.bin: is missing"),
        ([f"{at}/a", f"{at}/a"], "second time"),
        (f"{at}/a*", "its validation data"),
    ]:
        with pytest.raises(DataError, match=message):
            find_prefixes(spec)
    assert missing_prefixes(f"{at}/half") == [f"{at}/half"]
