"""Batches of the data loader."""

from __future__ import annotations

import pytest
import torch

from titan_cpt.data.batch import Batch


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU's driver pins memory")
def test_every_tensor_of_a_batch_is_pinned():
    """Otherwise its copy to the GPU waits."""
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    batch = Batch(
        tokens, tokens, starts_BL=tokens.int(), positions_BL=tokens.int(), sources_B=tokens[:, 0]
    ).pin_memory()

    assert all(tensor.is_pinned() for tensor in batch.tensors.values())
    assert Batch(tokens, tokens).pin_memory().starts_BL is None
