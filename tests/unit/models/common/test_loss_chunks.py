"""The size of a chunk of logits, which the loss and the memory estimate share."""

from titan_cpt.models.common.loss_chunks import LOGITS_CHUNK


def test_a_chunk_of_logits_takes_128_mib_in_bfloat16():
    """Two bytes per logit."""
    assert 2 * LOGITS_CHUNK == 128 * 1024**2
