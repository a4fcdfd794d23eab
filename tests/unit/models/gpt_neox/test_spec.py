"""GPT-NeoX's sizes and activation memory by hand; test_registry.py has the published parameter counts."""

import pytest

from titan_cpt.models.registry import named_size


def test_the_mlp_is_four_times_as_wide_as_the_model():
    """Also where an override sets the width."""
    assert named_size("gpt_neox", "1b", 257).mlp_width == 8192
    assert named_size("gpt_neox", "debug", 257, overrides={"width": 128}).mlp_width == 512


@pytest.mark.parametrize("tp", [1, 2])
def test_activation_memory_by_hand(tp):
    """Debug in bfloat16, width 64, MLP 256, 2 heads: 2 x (2 x 64 + 5 x 64 + 2 x 256) bytes and 6 fp32 statistics.

    Tensor parallelism shards everything except the two all-gathered inputs of 64 features.
    """
    saved = named_size("gpt_neox", "debug", 257).activation_bytes_per_token(tp=tp, cp=1, dtype_bytes=2)

    assert saved.compiled == saved.unchecked == 2 * 2 * 64 + (2 * (5 * 64 + 2 * 256) + 6 * 4) / tp
    assert saved.selective_op == (2 * (5 * 64 + 256) + 2 * 4) / tp
