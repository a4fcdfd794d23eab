"""Packed sequences as training reads them: inputs, targets, borders."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from packed import documents, pack_plainly
from remote_data import Counted, cache_in, copy_to_memory
from token_formats import write_ds, write_pair, write_raw

from titan_cpt.data.formats.token_files import TokenFiles, open_source, resolve_paths
from titan_cpt.data.packing.packed_documents import PackedDocuments
from titan_cpt.data.packing.packed_tokens import PackedTokens

EOD = 256


def opened(files):
    documents = PackedDocuments("datasets.x.train", files, resolve_paths(files), EOD)
    return PackedTokens(open_source(files, 257), documents, log=lambda line: None)


def written(folder, lengths, **how):
    """Documents of consecutive ids, so that each token shows where it is from; the last one is the end of document."""
    tokens = np.arange(sum(lengths)) % 256
    tokens[np.cumsum([length for length in lengths if length], dtype=int) - 1] = EOD
    write_pair(folder / "pair", lengths, tokens)
    return tokens, TokenFiles((str(folder / "pair"),), cache=cache_in(folder), **how)


def test_rows_by_hand(tmp_path):
    """Documents of 3, 10 and 5 tokens in sequences of 4: three full ones, then the 3 with the last token, and the 2."""
    _, files = written(tmp_path, [3, 10, 5])
    packed = opened(files)
    rows = [packed.row(number, 4) for number in range(packed.windows(4))]
    found = [(row.tokens.tolist(), row.targets.tolist(), row.starts) for row in rows]

    assert found == [
        ([3, 4, 5, 6, 7], [4, 5, 6, 7], ()),  # the document continues: the last position has a target
        ([7, 8, 9, 10, 11], [8, 9, 10, 11], ()),
        ([13, 14, 15, 16, EOD], [14, 15, 16, EOD], ()),
        ([0, 1, EOD, EOD, EOD], [1, EOD, -1, -1], (3,)),  # the third document's last token is a piece of its own
        ([11, EOD, EOD, EOD, EOD], [EOD, -1, -1, -1], (2,)),
    ]


@given(documents(most=20))
@settings(max_examples=30)
def test_every_token_is_an_input_once_and_a_target_once_except_first_ones(tmp_path_factory, drawn):
    lengths, seq_len = drawn
    if not sum(lengths):
        return
    tokens, files = written(tmp_path_factory.mktemp("packed"), lengths)
    packed = opened(files)
    numbers = range(packed.windows(seq_len))
    rows = [packed.row(number, seq_len) for number in numbers]
    pairs = [(int(x), int(y)) for row in rows for x, y in zip(row.tokens[:-1], row.targets, strict=True) if y >= 0]
    position, expected = 0, []
    for length in lengths:
        document = tokens[position : position + length].tolist()
        expected += itertools.pairwise(document)
        position += length

    assert sorted(pairs) == sorted(expected)
    assert packed.target_tokens(list(numbers), seq_len) == len(expected)
    inputs = np.concatenate([row.tokens[:-1] for row in rows])
    padding = len(inputs) - len(tokens)
    assert sorted(inputs) == sorted([*tokens, *[EOD] * padding])
    for row, sequence in zip(rows, pack_plainly(lengths, seq_len), strict=True):
        ends = np.cumsum([length for _, length, _ in sequence])
        assert row.starts == tuple(end for end in ends if end < seq_len), "where a document or the padding begins"
        assert (row.targets[ends[-1] :] == -1).all()


@pytest.mark.parametrize("form", ["ds", "raw"])
def test_other_formats_with_documents_give_the_rows_of_a_pair(tmp_path, form):
    lengths = [3, 10, 5, 4, 1, 1, 17]
    tokens, files = written(tmp_path, lengths)
    write_ds(tmp_path / "x.ds", tokens=tokens, ends=np.cumsum(lengths))
    write_raw(tmp_path / "x.bin", tokens=tokens)
    other = {
        "ds": TokenFiles((str(tmp_path / "x.ds"),), "ds", cache=files.cache),
        "raw": TokenFiles((str(tmp_path / "x.bin"),), "raw", "uint16", cache=files.cache),
    }[form]
    here, there = opened(files), opened(other)

    assert here.windows(6) == there.windows(6)
    for number in range(here.windows(6)):
        for mine, theirs in zip(here.row(number, 6), there.row(number, 6), strict=True):
            assert np.array_equal(mine, theirs)
    assert here.fingerprint() != there.fingerprint()


def test_remote_files_give_the_same_rows_and_are_fetched_in_advance(tmp_path):
    (tmp_path / "local").mkdir()
    _, files = written(tmp_path / "local", [30, 5, 0, 900, 8, 40] * 20)
    bucket = copy_to_memory(tmp_path / "local", "packed")
    here = opened(files)
    there = opened(TokenFiles((f"{bucket}/pair",), cache=cache_in(tmp_path)))
    numbers = range(there.windows(32))
    there.fetch(list(numbers), 32)
    with Counted() as counted:
        for number in numbers:
            assert there.row(number, 32).tokens.tolist() == here.row(number, 32).tokens.tolist()

    assert counted.ranges == 0
    assert there.is_remote
    assert there.fingerprint() == here.fingerprint()


def test_a_pickled_source_reads_the_same_rows(tmp_path):
    _, files = written(tmp_path, [30, 5, 0, 9, 8, 40])
    packed = opened(files)
    packed.windows(16)
    again = pickle.loads(pickle.dumps(packed))

    assert [again.row(n, 16).tokens.tolist() for n in range(6)] == [packed.row(n, 16).tokens.tolist() for n in range(6)]


def test_the_fingerprint_depends_on_tokens_and_on_borders(tmp_path):
    """So that a run does not resume with other documents, even if their tokens are the same."""
    found = set()
    for name, lengths, shift in (("a", [30, 10], 0), ("b", [20, 20], 0), ("c", [30, 10], 1)):
        write_pair(tmp_path / name, lengths, (np.arange(40) + shift) % 256)
        found.add(opened(TokenFiles((str(tmp_path / name),), cache=cache_in(tmp_path))).fingerprint())

    assert len(found) == 3
