"""The size of a chunk of logits, which the loss and the memory estimate share."""

from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.models.common.loss_chunks import LOGITS_CHUNK, logits_chunk


def test_a_chunk_of_logits_takes_128_mib_in_bfloat16():
    """Two bytes per logit."""
    assert 2 * LOGITS_CHUNK == 128 * 1024**2


@given(st.integers(min_value=8 * 2**30, max_value=2**40))
def test_a_gpus_chunk_takes_at_most_512_mib_and_a_64th_of_its_memory(device_bytes):
    """And never fewer logits than on a CPU."""
    assert LOGITS_CHUNK <= logits_chunk(device_bytes) <= 2**28
    assert 2 * logits_chunk(device_bytes) <= device_bytes / 64


def test_the_chunks_of_some_gpus():
    """24 GiB: 96 Mi logits, 192 MiB; 80 GiB and more: 256 Mi logits; a small GPU: a CPU's chunk."""
    assert [logits_chunk(gib * 2**30) for gib in (4, 24, 80, 141)] == [2**26, 96 * 2**20, 2**28, 2**28]
