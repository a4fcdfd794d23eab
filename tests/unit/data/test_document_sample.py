"""Lengths of the documents in a sample of sequences, and how far attention reaches in them."""

import numpy as np

from titan_cpt.data.document_sample import DocumentSample, measure_all, measure_documents
from titan_cpt.data.formats.indexed_writer import IndexedWriter
from titan_cpt.data.formats.token_files import TokenFiles

END = 256


def written(folder, *lengths):
    """A pair of documents of these lengths, each with its end-of-document id."""
    with IndexedWriter(folder / "pages", 257) as writer:
        for length in lengths:
            writer.add_document(np.array([1] * (length - 1) + [END]))
    return TokenFiles((str(folder / "pages"),), "indexed")


def test_documents_are_cut_by_sequences(tmp_path):
    """Documents of 5, 1, 2 and 7 tokens in sequences of 6: 5 + 1, 2 + 4; the rest of 3 has no target, and is unused."""
    found = measure_documents(written(tmp_path, 5, 1, 2, 7), 257, 6, end=END)

    assert found == DocumentSample((1, 2, 4, 5), (1, 1, 1, 1), sequences=2, available=2)


def test_the_mean_span_by_hand():
    """One document of 6 and three of 2: (6 * 6 + 3 * 2 * 2) / 12 = 4; in a window of 4: (6 * 4 + 12) / 12 = 3."""
    found = DocumentSample((2, 6), (3, 1), sequences=2, available=2)

    assert (found.mean_span(), found.mean_span(4), found.mean_span(100)) == (4.0, 3.0, 4.0)


def test_at_most_a_thousand_sequences_are_read(tmp_path):
    """Of 1,500 sequences of two documents of 2 tokens."""
    found = measure_documents(written(tmp_path, *[2] * 3001), 257, 4, end=END)

    assert found == DocumentSample((2,), (2000,), sequences=1000, available=1500)


def test_nothing_is_measured_without_a_tokenizer_or_a_length(tmp_path):
    """With the tokenizer of bytes, whose end-of-document id is 256, it is."""
    sources = [("pages", written(tmp_path, 3, 3, 3))]

    assert measure_all(sources, [], "bytes") == {}
    assert measure_all(sources, [4], str(tmp_path / "missing.json")) == {}
    assert measure_all(sources, [4, 4, 2], "bytes") == {
        ("pages", 2): DocumentSample((1, 2), (2, 3), sequences=4, available=4),
        ("pages", 4): DocumentSample((1, 2, 3), (1, 2, 1), sequences=2, available=2),
    }
