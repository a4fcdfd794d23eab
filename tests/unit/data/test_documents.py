"""Where documents begin in a batch, from the end-of-document ids and the borders of pieces."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.data.batch import Batch
from titan_cpt.data.documents import DocumentSettings, document_settings, document_starts

END = 9


def test_a_document_begins_after_each_end_of_document_id():
    """The id belongs to the document that it ends; two in succession are an empty document; one at the end begins none.

    Row by row: documents of 3, 1 (empty) and 2 tokens; of 1 (empty) and 5; a single one longer than the row.
    """
    inputs_BL = torch.tensor([[1, 2, END, END, 3, 4], [END, 1, 2, 3, 4, END], [1, 1, 1, 1, 1, 1]])

    assert document_starts(inputs_BL, END).tolist() == [[0, 0, 0, 3, 4, 4], [0, 1, 1, 1, 1, 1], [0] * 6]


def test_a_document_begins_where_a_piece_begins():
    """At position 4 of the second row; position 6 is that of its last target, which is not an input."""
    inputs_BL = torch.tensor([[1, END, 3, 4, 5, 6]] * 2)

    assert document_starts(inputs_BL, END, [(), (4, 6)]).tolist() == [[0, 0, 2, 2, 2, 2], [0, 0, 2, 2, 4, 4]]


@given(st.lists(st.lists(st.sampled_from([0, 1, END]), min_size=7, max_size=7), min_size=1, max_size=4))
def test_starts_are_those_of_a_search_backwards(rows):
    """The first position of a document is 0, or follows the nearest end-of-document id before."""
    starts = document_starts(torch.tensor(rows), END).tolist()

    assert starts == [
        [max([0, *(before + 1 for before in range(place) if row[before] == END)]) for place in range(7)] for row in rows
    ]


def test_a_batch_gets_only_what_is_set():
    """With neither mask nor positions there are no settings, and a batch stays as it is."""
    batch = Batch(torch.tensor([[1, END, 3, 4]]), torch.tensor([[END, 3, 4, 5]]))
    mask, positions = (DocumentSettings(END, mask, not mask).added_to(batch) for mask in (True, False))

    assert document_settings(END, mask=False, positions=False) is None
    assert document_settings(END, mask=True, positions=False) == DocumentSettings(END, True, False)
    assert (mask.starts_BL.tolist(), mask.positions_BL) == ([[0, 0, 2, 2]], None)
    assert (positions.starts_BL, positions.positions_BL.tolist()) == (None, [[0, 1, 0, 1]])
    assert positions.positions_BL.dtype == mask.starts_BL.dtype == torch.int32
