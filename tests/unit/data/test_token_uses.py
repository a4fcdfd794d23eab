"""How often data has each id: all windows, or an even sample of them."""

import numpy as np
from remote_data import cache_in

from titan_cpt.data.formats.indexed_writer import IndexedWriter
from titan_cpt.data.formats.token_files import TokenFiles, open_source
from titan_cpt.data.packing.packed_documents import PackedDocuments
from titan_cpt.data.packing.packed_tokens import PackedTokens
from titan_cpt.data.token_uses import count_token_uses

END = 256


def stream(folder, *documents):
    with IndexedWriter(folder, 257) as writer:
        for document in documents:
            writer.add_document(np.array(document))
    return open_source(TokenFiles((str(folder),), "indexed"), 257)


def nonzero(uses):
    return {int(number): int(uses.counts[number]) for number in np.flatnonzero(uses.counts)}


def test_all_inputs_of_all_windows_are_counted_once(tmp_path):
    """Windows of 4 inputs and a target: 11 tokens have two, the last three are in none of them."""
    source = stream(tmp_path / "a", [1, 2, 3, 1, 1, END], [5, 5, 7, 8, 9])
    uses = count_token_uses({"a": (source, 4), "again": (source, 2)}, 300)

    assert nonzero(uses) == {1: 3 + 3, 2: 2, 3: 2, 5: 2 + 2, END: 2, 7: 1, 8: 1}
    assert (uses.counted, uses.tokens, uses.is_complete) == (8 + 10, 8 + 10, True)
    assert str(uses) == "all 18 tokens"


def test_of_much_data_a_sample_at_even_distances_is_counted(tmp_path):
    """Ten windows of two tokens, each with its own ids, at most 8 tokens: the windows 0, 2, 5 and 7."""
    source = stream(tmp_path / "a", [*range(20), END])
    uses = count_token_uses({"a": (source, 2)}, 257, most_tokens=8)

    assert nonzero(uses) == dict.fromkeys([0, 1, 4, 5, 10, 11, 14, 15], 1)
    assert str(uses) == "an even sample of 8 of 20 tokens"
    assert not uses.is_complete


def test_packed_documents_are_counted_as_they_are_trained(tmp_path):
    """Each document once, whatever order they are packed in; END also fills the rest of a sequence."""
    source = stream(tmp_path / "a", [1, 2, 3, END], [5, END], [7, 7, 7, 7, END])
    files = TokenFiles((str(tmp_path / "a"),), "indexed", best_fit=True, cache=cache_in(tmp_path))
    documents = PackedDocuments("datasets.a.train", files, [tmp_path / "a"], END)
    uses = count_token_uses({"a": (PackedTokens(source, documents, log=print), 6)}, 257)

    assert {key: count for key, count in nonzero(uses).items() if key != END} == {1: 1, 2: 1, 3: 1, 5: 1, 7: 4}


class Remote:
    """A source in object storage; reading it is a fault."""

    is_remote = True


def test_sources_in_object_storage_are_not_read(tmp_path):
    """They are named, and no count is complete."""
    source = stream(tmp_path / "a", [1, 2, END])
    uses = count_token_uses({"a": (source, 2), "far": (Remote(), 2)}, 257)

    assert str(uses) == "all 2 tokens, without far in object storage"
    assert not uses.is_complete
    assert count_token_uses({"far": (Remote(), 2)}, 257).counts.sum() == 0
