"""What every family's spec computes: widths, parameters and FLOPs, by hand for a small Llama; RoPE scaling's values."""

import json
import math

import pytest

from titan_cpt.errors import ConfigError
from titan_cpt.models.registry import as_config_table, named_size, spec_from_recipe
from titan_cpt.models.spec import ParameterSpec, Rope, RopeScaling, rope_scaling_problems


def llama(**overrides):
    """2 blocks, width 64, 4 heads of 16 features, 2 key/value heads, MLP width 192, 384 rows of the embedding."""
    return named_size("llama", "debug", 257, overrides={"heads": 4, "kv_heads": 2, "vocab_size": 384, **overrides})


def test_grouped_query_attention_has_fewer_key_features():
    """2 of 4 heads; all of them in GPT-NeoX."""
    assert (llama().attention_width, llama().kv_width) == (64, 32)
    assert llama(head_width=24).kv_width == 48
    assert named_size("gpt_neox", "debug", 257).kv_width == 64


def test_parameters_are_those_of_the_blocks_the_final_norm_and_the_embeddings():
    """A block: norms 2 x 64, q and out 2 x 4096, k and v 2 x 2048, MLP 3 x 12,288. A tied embedding counts once."""
    block = 2 * 64 + 2 * 64 * 64 + 2 * 32 * 64 + 3 * 192 * 64
    spec = llama()

    assert spec.parameters_without_embeddings == 2 * block + 64
    assert spec.embedding_parameters == 384 * 64
    assert spec.parameters == 2 * block + 64 + 2 * 384 * 64
    assert llama(tie_embeddings=True).parameters == 2 * block + 64 + 384 * 64
    assert ParameterSpec("x", (3, 5), None).elements == 15


def test_flops_count_the_head_and_at_most_the_sliding_window():
    """6 per parameter that multiplies, and 12 x 2 layers x 64 features x 16 or 10 positions."""
    products = llama().parameters_without_embeddings + 384 * 64

    assert llama().flops_per_token(16) == 6 * products + 12 * 2 * 64 * 16
    assert llama(sliding_window=10).flops_per_token(16) == 6 * products + 12 * 2 * 64 * 10
    assert llama(tie_embeddings=True, sliding_window=100).flops_per_token(16) == llama().flops_per_token(16)


def test_the_attention_factor_follows_from_yarns_factor():
    """0.1 ln(factor) + 1 (arXiv:2309.00071, equation 22); 1 for llama3; a given one stays."""
    yarn = RopeScaling(kind="yarn", factor=4.0, original_seq_len=64)

    assert yarn.attention_factor == pytest.approx(1 + 0.1 * math.log(4))
    assert RopeScaling(kind="llama3", factor=4.0, original_seq_len=64).attention_factor == 1.0
    assert RopeScaling(kind="yarn", factor=4.0, original_seq_len=64, attention_factor=2.0).attention_factor == 2.0


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, []),
        ({"factor": 0.5}, ["model.rope_scaling.factor: must be 1 or more, got 0.5"]),
        ({"original_seq_len": 0}, ["model.rope_scaling.original_seq_len: must be above 0, got 0"]),
        ({"beta_slow": 32.0}, ["model.rope_scaling.beta_slow: must be above 0 and below beta_fast, got 32"]),
        ({"original_seq_len": None}, ["model.rope_scaling.original_seq_len: is missing; yarn needs it"]),
        ({"kind": "linear"}, ["model.rope_scaling.original_seq_len: must be unset with kind linear, got 64"]),
        ({"kind": "linear", "original_seq_len": None}, []),
        ({"kind": "ntk"}, ["model.rope_scaling.kind: must be one of linear, llama3, yarn, got 'ntk'"]),
    ],
)
def test_a_rope_scaling_that_cannot_work_is_reported(changes, problem):
    """One line per value, under its config key."""
    scaling = RopeScaling(**{"kind": "yarn", "factor": 4.0, "original_seq_len": 64, **changes})

    assert rope_scaling_problems(scaling) == problem


def test_a_recipe_of_gpt_neox_has_a_scaling_only_where_the_model_has_one():
    """Recipes from before the key existed stay as they are, and are read; one with a scaling is read back whole."""
    plain = named_size("gpt_neox", "debug", 257)
    scaled = plain.with_rope(Rope(500.0, RopeScaling(kind="yarn", factor=4.0, original_seq_len=64)))

    assert "model.rope_scaling" not in plain.as_recipe()
    assert llama().as_recipe()["model.rope_scaling"] is None
    assert scaled.as_recipe()["model.rope_scaling"]["factor"] == 4.0
    assert [spec_from_recipe(json.loads(json.dumps(one.as_recipe()))) for one in (plain, scaled)] == [plain, scaled]
    assert 'rope_scaling = { kind = "yarn", factor = 4.0, original_seq_len = 64,' in as_config_table(scaled)
    assert scaled.with_rope(plain.rope) == plain


def test_a_model_with_another_rope_is_otherwise_the_same():
    """A scaling that cannot work is refused as in [model]."""
    rope = Rope(5e6, RopeScaling(kind="llama3", factor=8.0, original_seq_len=8192))
    spec = llama().with_rope(rope)

    assert (spec.rope, spec.parameters, spec.heads) == (rope, llama().parameters, 4)
    assert str(rope) == "base 5,000,000, llama3 x 8 of 8,192 tokens"
    yarn = RopeScaling(kind="yarn", factor=4.0, original_seq_len=64, beta_fast=16.0)
    assert str(Rope(500.0, yarn)) == "base 500, yarn x 4 of 64 tokens (beta_fast 16)"
    assert str(Rope(1e6, RopeScaling(kind="linear", factor=8.0))) == "base 1,000,000, linear x 8"
    assert str(llama().rope) == "base 10,000 without scaling"
    with pytest.raises(ConfigError, match=r"model\.rope_scaling\.factor: must be 1 or more, got 0\.5"):
        llama().with_rope(Rope(5e6, RopeScaling(kind="yarn", factor=0.5, original_seq_len=8)))
