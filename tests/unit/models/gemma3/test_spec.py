"""Gemma 3's activation memory by hand, and what its fields become under overrides."""

import pytest

from titan_cpt.models.registry import named_size


def gemma(**overrides):
    """Width 64, 4 heads of 16 features, 2 key/value heads, MLP width 192, 3 layers of which the last is global."""
    return named_size("gemma3", "debug", 257, {"heads": 4, "kv_heads": 2, "head_width": 16, **overrides})


@pytest.mark.parametrize("tp", [1, 2])
def test_activation_memory_by_hand(tp):
    """In bfloat16: two inputs of 64; queries and output 64 each; 4 x 192 of the MLP; keys and values of 64 each in two
    of three layers, of 32 each in the third.

    In fp32: 8 x 64 of the norms, 2 x 96 of those of queries and keys, and 4 + 4 statistics. Compiled: 3 x 192 of the
    MLP, and in bf16 3 x 64 + 96 of the norms.
    """
    saved = gemma().activation_bytes_per_token(tp=tp, cp=1, dtype_bytes=2)
    attention = 2 * 64 + 2 * (2 * 64 + 32) / 3

    assert saved.unchecked == pytest.approx(
        2 * 2 * 64 + (2 * (attention + 4 * 192) + 4 * (8 * 64 + 2 * 96) + 8 * 4) / tp
    )
    assert saved.compiled == pytest.approx(2 * 2 * 64 + (2 * (attention + 3 * 192 + 3 * 64 + 96) + 8 * 4) / tp)
    assert saved.selective_op == 2 * 64 + (2 * (64 + 2 * 64 + 32 + 192) + 4 * 4) / tp


def test_context_parallelism_repeats_and_gathers_keys_and_values_of_global_layers_too():
    """2 x 64 features of all positions in every layer."""
    one, two = (gemma().activation_bytes_per_token(tp=1, cp=cp, dtype_bytes=2).unchecked for cp in (1, 2))

    assert two - one == pytest.approx(2 * (2 * 2 * 64 - 2 * (2 * 64 + 32) / 3))


def test_flops_count_the_windows_of_local_layers():
    """12 x 64 features x (2 x 10 + 16) positions in the layers: local, local, global."""
    spec = gemma(sliding_window=10)
    products = spec.parameters_without_embeddings + spec.embedding_parameters

    assert spec.flops_per_token(16) == 6 * products + 12 * 64 * (2 * 10 + 16)


def test_the_scale_of_scores_follows_the_head_width_unless_it_is_set():
    """Also if an override changes the head width; 27b sets it to width / heads = 168, with heads of 128."""
    large = named_size("gemma3", "27b", 257)

    assert gemma().query_pre_attn_scalar == 16.0
    assert gemma(query_pre_attn_scalar=9.0).query_pre_attn_scalar == 9.0
    assert (large.query_pre_attn_scalar, large.head_width, large.width // large.heads) == (168.0, 128, 168)
