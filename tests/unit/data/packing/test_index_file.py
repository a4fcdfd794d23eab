"""The packing index: what was written is read, and a damaged or foreign file is refused."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import documents, pack_plainly

from titan_cpt.data.packing.index_file import DamagedIndexError, PackingIndex, write_index
from titan_cpt.data.packing.pieces import packed_segments

LENGTHS = [5, 0, 12, 1, 3, 8, 8, 2, 30, 4]


def written(folder, lengths=LENGTHS, seq_len=8, borders="b", group=4):
    path = folder / "index.pack"
    with open(path, "wb") as file:
        segments = packed_segments([np.array(lengths, np.int64)], seq_len, group_documents=group)
        write_index(file, segments, seq_len=seq_len, borders=borders)
    return path


def opened(path, seq_len=8, borders="b"):
    return PackingIndex(path, seq_len=seq_len, borders=borders, check_content=True)


@given(documents(), st.integers(1, 70))
@settings(max_examples=60)
def test_sequences_are_read_as_they_were_packed(tmp_path_factory, drawn, group):
    lengths, seq_len = drawn
    index = opened(written(tmp_path_factory.mktemp("index"), lengths, seq_len, group=group), seq_len)
    expected = pack_plainly(lengths, seq_len, group)
    found = [[tuple(piece) for piece in index.pieces(number)] for number in range(index.counts.sequences)]
    asked = np.random.default_rng(0).permutation(len(expected))

    assert found == expected
    assert index.targets(asked).tolist() == [sum(length - (not c) for _, length, c in expected[k]) for k in asked]


def test_an_index_can_be_pickled_and_its_numbers_are_checked(tmp_path):
    index = opened(written(tmp_path))
    index.pieces(0)

    assert len(pickle.dumps(index)) < 2000, "the memory map is not copied"
    assert pickle.loads(pickle.dumps(index)).pieces(3) == index.pieces(3)
    for number in (-1, index.counts.sequences):
        with pytest.raises(IndexError, match=f"sequence {number} of"):
            index.pieces(number)


def test_every_truncation_is_noticed(tmp_path):
    path = written(tmp_path)
    content = path.read_bytes()
    for size in [*range(0, len(content) - 60, 7), *range(len(content) - 60, len(content))]:
        path.write_bytes(content[:size])
        with pytest.raises(DamagedIndexError):
            opened(path)


def test_every_changed_byte_is_noticed(tmp_path):
    path = written(tmp_path)
    content = path.read_bytes()
    for place in [*range(0, len(content) - 60, 5), *range(len(content) - 60, len(content))]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(DamagedIndexError):
            opened(path)


def test_the_index_of_other_documents_or_lengths_is_refused(tmp_path):
    path = written(tmp_path)
    for other in ({"seq_len": 16}, {"borders": "c"}):
        with pytest.raises(DamagedIndexError, match="of other documents"):
            opened(path, **other)


def test_an_index_stays_readable_while_another_one_replaces_it(tmp_path):
    """A rename leaves the old file to those who have it open."""
    index = opened(written(tmp_path))
    before = index.pieces(2)
    (tmp_path / "new").mkdir()
    written(tmp_path / "new", [8, 8, 8, 8], borders="new").replace(index.path)

    assert index.pieces(2) == before
