"""Document lengths of each format, compared with the documents that were written."""

import numpy as np
import pytest
from remote_data import Counted, cache_in, copy_to_memory
from token_formats import TOKENS, VOCAB, write_ds, write_pair, write_raw

from titan_cpt.data.formats.indexed_layout import HEADER
from titan_cpt.data.formats.token_files import TokenFiles, resolve_paths
from titan_cpt.data.packing import document_lengths as module
from titan_cpt.data.packing.document_lengths import borders_digest, document_lengths
from titan_cpt.errors import DataError

EOD = 256
SIZES = (7, 0, 300, 1, 1, 371)


def lengths_of(files, eod_id=EOD):
    blocks = document_lengths(files, resolve_paths(files), eod_id)
    return [int(length) for block in blocks for length in block]


def digest_of(files, eod_id=EOD):
    return borders_digest(files, resolve_paths(files), eod_id)


def with_documents(prefix, sizes, first_sequences):
    """Rewrite the document indices of a pair."""
    idx = prefix.with_name(f"{prefix.name}.idx")
    content = idx.read_bytes()
    head = HEADER.unpack(content[: HEADER.size])
    sequences = content[HEADER.size : HEADER.size + 12 * len(sizes)]
    last = np.array(first_sequences, "<i8").tobytes()
    idx.write_bytes(HEADER.pack(*head[:4], len(first_sequences)) + sequences + last)


@pytest.mark.parametrize("block", [1, 2, 1 << 20])
def test_a_pair_has_the_documents_of_its_index(tmp_path, monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK", block)
    write_pair(tmp_path / "pair", SIZES)

    assert lengths_of(TokenFiles((str(tmp_path / "pair"),))) == list(SIZES)


@pytest.mark.parametrize("block", [1, 2, 1 << 20])
@pytest.mark.parametrize(
    ("first_sequences", "lengths"),
    [
        ((0, 2, 2, 6), [7, 0, 673]),  # several sequences in a document; a document without a sequence
        ((0, 6), [680]),
        ((0, 3), [307, 1, 1, 371]),  # sequences behind the last document
        ((0,), list(SIZES)),  # a writer that never closed a document
    ],
)
def test_documents_of_several_sequences_are_summed(tmp_path, monkeypatch, block, first_sequences, lengths):
    monkeypatch.setattr(module, "BLOCK", block)
    prefix = write_pair(tmp_path / "pair", SIZES)
    with_documents(prefix, SIZES, first_sequences)

    assert lengths_of(TokenFiles((str(prefix),))) == lengths


def test_documents_of_several_files_follow_each_other(tmp_path):
    write_pair(tmp_path / "a-1", SIZES)
    write_pair(tmp_path / "a-2", (680,))
    write_ds(tmp_path / "b-1.ds", ends=(100, 100, 250, 680))
    write_ds(tmp_path / "b-2.ds", ends=(680,))

    assert lengths_of(TokenFiles((str(tmp_path / "a-*"),))) == [*SIZES, 680]
    assert lengths_of(TokenFiles((str(tmp_path / "b-*.ds"),), "ds")) == [100, 0, 150, 430, 680]


@pytest.mark.parametrize("scanned", [1, 7, 1 << 24])
def test_raw_files_are_divided_behind_each_end_of_document_id(tmp_path, monkeypatch, scanned):
    """The last document of a file ends with the file, with or without that id."""
    monkeypatch.setattr(module, "SCAN_TOKENS", scanned)
    first = [1, 2, EOD, EOD, 3, 4, 5, 6]
    second = [7, EOD]
    write_raw(tmp_path / "a.bin", tokens=first)
    write_raw(tmp_path / "b.bin", tokens=second)

    assert lengths_of(TokenFiles((str(tmp_path / "*.bin"),), "raw", "uint16")) == [3, 1, 4, 2]


def test_raw_files_without_an_end_of_document_are_refused(tmp_path):
    write_raw(tmp_path / "a.bin", tokens=TOKENS % 256)

    with pytest.raises(DataError, match=r'id 256 does not occur.*packing = "concat"'):
        lengths_of(TokenFiles((str(tmp_path / "a.bin"),), "raw", "uint16"))


def test_a_remote_index_is_transferred_once(tmp_path):
    (tmp_path / "local").mkdir()
    sizes = [len(TOKENS)] + [0] * 5000
    write_pair(tmp_path / "local" / "pair", sizes)
    files = TokenFiles((f"{copy_to_memory(tmp_path / 'local', 'packing')}/pair",), cache=cache_in(tmp_path))
    assert lengths_of(files) == sizes

    with Counted() as counted:
        assert lengths_of(files) == sizes
        assert digest_of(files) == digest_of(TokenFiles((str(tmp_path / "local" / "pair"),)))
    assert counted.bytes < 100, "only the last entry, to count the tokens"


def test_the_digest_depends_on_the_borders_and_not_on_tokens_or_paths(tmp_path):
    one = write_pair(tmp_path / "one", SIZES)
    other = write_pair(tmp_path / "other", SIZES, tokens=(TOKENS + 1) % VOCAB)
    moved = write_pair(tmp_path / "moved", (8, 0, 299, 1, 1, 371))
    digest = digest_of(TokenFiles((str(one),)))

    assert digest_of(TokenFiles((str(other),))) == digest
    assert digest_of(TokenFiles((str(moved),))) != digest
    with_documents(one, SIZES, (0, 1, 2, 3, 4, 6, 6))
    assert digest_of(TokenFiles((str(one),))) != digest


def test_the_digest_of_raw_files_depends_on_the_end_of_document_id(tmp_path):
    files = TokenFiles((str(write_raw(tmp_path / "a.bin")),), "raw", "uint16")

    assert digest_of(files, 256) != digest_of(files, 255)


def test_lengths_that_do_not_add_up_are_refused(tmp_path):
    """Beyond what opening the file checks: a large index is only sampled then."""
    prefix = write_pair(tmp_path / "pair", SIZES)
    idx = tmp_path / "pair.idx"
    content = bytearray(idx.read_bytes())
    content[HEADER.size : HEADER.size + 4] = (9).to_bytes(4, "little")
    idx.write_bytes(content)
    with pytest.raises(DataError, match="680 tokens, but the documents of its index have 682"):
        lengths_of(TokenFiles((str(prefix),)))

    content[HEADER.size : HEADER.size + 4] = (-9 + 2**32).to_bytes(4, "little")
    idx.write_bytes(content)
    with pytest.raises(DataError, match="negative length"):
        lengths_of(TokenFiles((str(prefix),)))
    with_documents(write_pair(tmp_path / "pair", SIZES), SIZES, (0, 5, 2))
    with pytest.raises(DataError, match="do not increase"):
        lengths_of(TokenFiles((str(prefix),)))
