"""Lengths of the documents in a sample of sequences, and how far attention reaches in them."""

from dataclasses import replace

import numpy as np

from titan_cpt.data.document_sample import DocumentSample, PresentFiles, measure_all, measure_documents
from titan_cpt.data.formats.indexed_writer import IndexedWriter
from titan_cpt.data.formats.token_files import TokenFiles

END = 256


def written(folder, *lengths):
    """A pair of documents of these lengths, each with its end-of-document id."""
    with IndexedWriter(folder / "pages", 257) as writer:
        for length in lengths:
            writer.add_document(np.array([1] * (length - 1) + [END]))
    prefix = folder / "pages"
    return PresentFiles(TokenFiles((str(prefix),), "indexed"), [prefix], sum(lengths))


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


def test_documents_that_are_packed_are_cut_as_packing_cuts_them(tmp_path):
    """Of 5, 1, 2 and 14 tokens in sequences of 6: whole ones, and 6 + 6 + 2; 22 tokens fill 4 sequences."""
    present = written(tmp_path, 5, 1, 2, 14)
    packed = present._replace(files=replace(present.files, best_fit=True))

    assert measure_documents(packed, 257, 6, end=END) == DocumentSample((1, 2, 5, 6), (1, 2, 1, 2), 4, 4)


def test_sequences_of_another_length_are_not_measured(tmp_path):
    """Files that are cut into sequences of 4 already, which a stage of length 8 may replay in parts."""
    prefix = tmp_path / "cut"
    with IndexedWriter(prefix, 257) as writer:
        for _ in range(3):
            writer.add_document(np.array([1, END, 1, 1, 1]))
    present = PresentFiles(TokenFiles((str(prefix),), "presequenced"), [prefix], 15)

    assert measure_documents(present, 257, 4, end=END) == DocumentSample((2,), (6,), sequences=3, available=3)
    assert measure_documents(present, 257, 8, end=END) is None
