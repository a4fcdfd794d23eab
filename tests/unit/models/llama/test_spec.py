"""Llama's activation memory and head widths by hand; test_model.py compares sizes with released configurations."""

import pytest

from titan_cpt.errors import ConfigError
from titan_cpt.models.registry import named_size


def llama(**overrides):
    """Width 64, 4 heads of 16 features, 2 key/value heads, MLP width 192."""
    return named_size("llama", "debug", 257, overrides={"heads": 4, "kv_heads": 2, **overrides})


def test_a_head_has_an_equal_part_of_the_width_unless_it_is_set():
    """Qwen3's heads have 128 features whatever its width is."""
    assert llama().head_width == 16
    assert llama(width=128).head_width == 32
    assert llama(head_width=24).attention_width == 96
    assert named_size("llama", "qwen3-0.6b", 257).attention_width == 2048
    with pytest.raises(ConfigError, match=r"model\.heads: must divide model.width = 64"):
        llama(heads=6)


@pytest.mark.parametrize("tp", [1, 2])
def test_activation_memory_by_hand(tp):
    """In bfloat16: two inputs of 64; queries and output 64 each, keys and values 32 each, 4 x 192 of the MLP.

    In fp32: 4 x 64 of the norms, and 2 + 4 statistics. Compiled: 3 x 192 of the MLP, and 2 x 64 of the norms in bf16.
    """
    saved = llama().activation_bytes_per_token(tp=tp, cp=1, dtype_bytes=2)

    assert saved.unchecked == 2 * 2 * 64 + (2 * (2 * 64 + 2 * 32 + 4 * 192) + 4 * 4 * 64 + 6 * 4) / tp
    assert saved.selective_op == 2 * 64 + (2 * (64 + 2 * 64 + 32 + 192) + 4 * 4) / tp
    assert saved.compiled == 2 * 2 * 64 + (2 * (2 * 64 + 2 * 32 + 3 * 192 + 2 * 64) + 6 * 4) / tp


def test_masks_context_parallelism_and_query_norms_take_more_memory():
    """Repeated keys and values: 2 x 32 features more, of all positions under CP; normed queries and keys in fp32."""
    plain = llama().activation_bytes_per_token(tp=1, cp=1, dtype_bytes=2).unchecked

    def added(cp=1, **overrides):
        return llama(**overrides).activation_bytes_per_token(tp=1, cp=cp, dtype_bytes=2).unchecked - plain

    assert added(sliding_window=8) == 2 * 2 * 32
    assert added(cp=2) == 2 * (2 * 2 * 64 - 2 * 32)
    assert added(qk_norm=True) == 4 * 2 * (64 + 32)
