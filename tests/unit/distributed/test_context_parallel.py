"""The positions of a context-parallel rank, and what can be tested of ring attention without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor.experimental._context_parallel import _HeadTailLoadBalancer

from titan_cpt.distributed.context_parallel import local_positions


def test_the_positions_by_hand() -> None:
    """Eight positions over two ranks: the first and the last quarter, and the two in the middle."""
    assert local_positions(8, 0, 2).tolist() == [0, 1, 6, 7]
    assert local_positions(8, 1, 2).tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_positions_of_a_rank_are_those_of_torchs_ring_attention(degree: int) -> None:
    """torch's load balancer decides which positions a rank has; ours must agree."""
    length = 24 * degree
    balance = _HeadTailLoadBalancer(length, degree, "cpu")._generate_indices(restore=False).flatten()
    ours = torch.cat([local_positions(length, rank, degree) for rank in range(degree)])

    assert ours.tolist() == balance.tolist()
