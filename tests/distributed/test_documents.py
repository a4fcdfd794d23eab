"""Documents that attention does not leave are independent to the last bit, however a model is laid over ranks."""

import json

import faulty
import pytest
import torch.distributed as dist
import training
from faulty import Life

pytestmark = [
    *training.THEIR_WARNINGS_IGNORED,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo"),
]


def test_other_tokens_around_a_document_change_no_bit_of_its_gradients(tmp_path):
    """FSDP2, TP, CP and a pipeline on two ranks; both families, a window, grouped queries; without a mask they do."""
    life = Life((str(tmp_path),), main="document_ranks:independent")
    ended = [faulty.outcome_of(*one) for one in faulty.start_all(life, tmp_path / "ranks", ranks=2)]

    assert [one.status for one in ended] == [0, 0], "\n".join(one.output for one in ended)
    for rank in range(2):
        equal = json.loads((tmp_path / f"equal-{rank}.json").read_text())
        assert len(equal) == 4 * 2 * 2 * 2
        assert {key: same for key, same in equal.items() if same != key.endswith("True")} == {}
