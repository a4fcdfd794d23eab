"""OLMo's activation memory and FLOPs by hand; test_model.py compares sizes with released configurations."""

import pytest

from titan_cpt.models.registry import named_size


def olmo(**overrides):
    """Width 64, 4 heads of 16 features, 2 key/value heads, MLP width 192."""
    return named_size("olmo", "debug", 257, overrides={"layers": 4, "heads": 4, "kv_heads": 2, **overrides})


@pytest.mark.parametrize("tp", [1, 2])
def test_activation_memory_by_hand(tp):
    """In bfloat16: two inputs of 64; queries and output 64 each, keys and values 32 each, 4 x 192 of the MLP.

    In fp32: before and after four norms 64 and 64 of the stream, 64 of queries, 32 of keys; 4 + 4 statistics.
    Compiled: 3 x 192 of the MLP, and the norms' inputs only before, in bfloat16.
    """
    saved = olmo().activation_bytes_per_token(tp=tp, cp=1, dtype_bytes=2)
    norms = 64 + 64 + 64 + 32

    assert saved.unchecked == 2 * 2 * 64 + (2 * (2 * 64 + 2 * 32 + 4 * 192) + 4 * 2 * norms + 8 * 4) / tp
    assert saved.selective_op == 2 * 64 + (2 * (64 + 2 * 64 + 32 + 192) + 4 * 4) / tp
    assert saved.compiled == 2 * 2 * 64 + (2 * (2 * 64 + 2 * 32 + 3 * 192 + norms) + 8 * 4) / tp


def test_only_windowed_layers_take_the_memory_of_masks():
    """Repeated keys and values, 2 x 32 features more: in three of four layers; with CP in all, of all positions."""
    window = {"sliding_window": 8, "global_interval": 4}
    plain = olmo().activation_bytes_per_token(tp=1, cp=1, dtype_bytes=2).unchecked
    windowed, with_cp = (olmo(**window).activation_bytes_per_token(tp=1, cp=cp, dtype_bytes=2) for cp in (1, 2))

    assert windowed.unchecked - plain == 2 * 2 * 32 * 3 / 4
    assert with_cp.unchecked - plain == 2 * (2 * 2 * 64 - 2 * 32)


def test_flops_count_the_window_of_each_layer():
    """OLMo 3 7B at 8,192 tokens: 24 layers attend to 4,096 positions and 8 to all; 12 D operations for each."""
    spec, full = named_size("olmo", "olmo3-7b", 257), named_size("olmo", "olmo2-7b", 257)

    assert full.flops_per_token(8192) - spec.flops_per_token(8192) == 12 * 4096 * 24 * 4096
    assert spec.flops_per_token(4096) == full.flops_per_token(4096)
