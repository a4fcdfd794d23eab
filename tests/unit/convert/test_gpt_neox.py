"""GPT-NeoX's YAML: schedules equal its formula, model fields and batches equal its arithmetic, each key in one list."""

import math
from fractions import Fraction

import pytest
from converted import converted, found, learning_rates, listed, planned
from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.convert import gpt_neox

BASE = {
    "num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "seq_length": 2048, "pos_emb": "rotary",
    "rotary_pct": 0.25, "gpt_j_residual": True, "no_weight_tying": True, "init_method": "small_init",
    "output_layer_init_method": "wang_init", "optimizer.type": "Adam", "optimizer.params.lr": 3e-4,
    "optimizer.params.betas": [0.9, 0.95], "min_lr": 3e-5, "train_iters": 1000, "lr_decay_style": "cosine",
    "train_micro_batch_size_per_gpu": 4,
}  # fmt: skip
LLAMA = BASE | {
    "norm": "rmsnorm", "activation": "swiglu", "rotary_pct": 1, "gpt_j_residual": False, "use_bias_in_norms": False,
    "use_bias_in_attn_linear": False, "use_bias_in_mlp": False, "rms_norm_epsilon": 1e-5,
}  # fmt: skip


def theirs(n, *, style, peak, low, warmup, decay):
    """GPT-NeoX's LR after n iterations, n counted from 0."""
    if warmup > 0 and n <= warmup:
        return peak * max(1, n) / warmup
    x = (n - warmup) / (decay - warmup)
    decayed = {
        "constant": peak,
        "linear": peak * (1 - x),
        "cosine": low + (peak - low) / 2 * (1 + math.cos(math.pi * x)),
        "exponential": peak * math.exp(-0.693 * x),
    }[style]
    return max(decayed, low)


@pytest.mark.parametrize(
    ("style", "low"), [("cosine", 3e-5), ("cosine", 0.0), ("linear", 0.0), ("exponential", 0.0), ("constant", 0.0)]
)
@pytest.mark.parametrize("warmup", [0.0, 0.01, 0.0105])
def test_step_n_of_gpt_neox_has_the_learning_rate_of_step_n_minus_1_here(style, low, warmup):
    conversion = converted(gpt_neox, BASE | {"lr_decay_style": style, "min_lr": low, "warmup": warmup})
    steps = [2, 5, 10, 11, 12, 100, 500, 999, 1000]
    expected = [theirs(n - 1, style=style, peak=3e-4, low=low, warmup=warmup * 1000, decay=1000) for n in steps]
    assert learning_rates(conversion, at=[n - 1 for n in steps]) == pytest.approx(expected, rel=1e-12)
    assert any("step n - 1 has here" in finding.text for finding in conversion.decisions)


def test_a_cosine_that_ends_before_training_stays_at_min_lr():
    conversion = converted(gpt_neox, BASE | {"lr_decay_iters": 400, "warmup": 0.1})
    expected = [theirs(n, style="cosine", peak=3e-4, low=3e-5, warmup=40, decay=400) for n in (1, 40, 200, 400)]
    assert learning_rates(conversion, at=[1, 40, 200, 400]) == pytest.approx(expected, rel=1e-12)
    assert learning_rates(conversion, at=[401, 1000]) == [3e-5, 3e-5]
    assert "rises again" in found(conversion.decisions, "lr_decay_iters").text


def test_a_cosine_that_ends_after_training_keeps_its_length_and_says_where_to_stop():
    conversion = converted(gpt_neox, BASE | {"lr_decay_iters": 4000})
    assert planned(conversion)[1].stages[0].steps == 4000
    assert "stop there" in found(conversion.decisions, "train_iters").text


def test_a_linear_decay_with_a_floor_is_a_decision_because_gpt_neox_aims_at_0():
    conversion = converted(gpt_neox, BASE | {"lr_decay_style": "linear"})
    assert "falls to 0" in found(conversion.decisions, "lr_decay_style").text


def test_the_shape_of_pythia_410m_is_the_named_size_and_nothing_else():
    conversion = converted(gpt_neox, BASE)
    model = {key for key in conversion.values if key.startswith("model.")}
    assert model == {"model.family", "model.size"}
    assert planned(conversion)[1].spec.parameters == 405_334_016  # Pythia-410m on the hub
    assert conversion.same_architecture


@pytest.mark.parametrize(
    ("whole", "multiple", "expected"), [(32_768, 256, 11_008), (14_336, 1, 4778), (None, 256, 1536), (None, 1, 1365)]
)
def test_a_gated_mlp_has_a_third_of_intermediate_size_rounded_up(whole, multiple, expected):
    """Llama 2 7B's 11,008 is written as 32,768 in GPT-NeoX's own file; the others by hand."""
    assert gpt_neox.mlp_width_of(1024, whole, multiple=multiple, gated=True)[0] == expected


def test_a_llama_model_is_family_llama_and_biases_are_another_architecture():
    assert converted(gpt_neox, LLAMA).same_architecture
    assert converted(gpt_neox, LLAMA).values["model.family"] == "llama"
    with_biases = {key: value for key, value in LLAMA.items() if key != "use_bias_in_mlp"}
    assert not converted(gpt_neox, with_biases).same_architecture


@pytest.mark.parametrize(
    "key_and_value",
    [
        ("pos_emb", "alibi"),
        ("hidden_dropout", 0.1),
        ("attention_config", [[["mamba"], 24]]),
        ("no_weight_tying", False),
    ],
)
def test_other_architectures_are_named(key_and_value):
    key, value = key_and_value
    conversion = converted(gpt_neox, BASE | {key: value})
    assert not conversion.same_architecture
    assert "another architecture" in found(conversion.unmatched, key).text


def test_heads_that_cannot_be_built_leave_a_model_that_plans():
    conversion = converted(gpt_neox, BASE | {"num_attention_heads": 7})
    assert "placeholder" in found(conversion.unmatched, "num_attention_heads").text
    planned(conversion)


def test_the_global_batch_is_micro_batch_x_accumulation_x_data_parallel_ranks():
    keys = BASE | {"gradient_accumulation_steps": 8, "model_parallel_size": 2, "pipe_parallel_size": 1}
    assert converted(gpt_neox, keys, world_size=16).values["training.global_batch_size"] == 4 * 8 * 8
    assert converted(gpt_neox, keys | {"global_num_gpus": 4}).values["training.global_batch_size"] == 4 * 8 * 2
    assert converted(gpt_neox, keys | {"train_batch_size": 96}).values["training.global_batch_size"] == 96


def test_accumulation_becomes_micro_batches_of_the_pipeline():
    values = converted(gpt_neox, BASE | {"gradient_accumulation_steps": 8, "pipe_parallel_size": 2}).values
    assert values["training.local_batch_size"] == 32
    assert values["parallelism.pipeline_parallel_microbatch_size"] == 4


def test_weighted_data_become_domains():
    conversion = converted(gpt_neox, BASE | {"train_data_paths": ["a/x", "b/y"], "train_data_weights": [1.0, 3]})
    domains = planned(conversion)[0].datasets["data"].domains
    assert {domain.train[0]: domain.weight for domain in domains.values()} == {"a/x": 1.0, "b/y": 3.0}


def test_warmup_is_a_fraction_of_lr_decay_iters_and_exact():
    lr, _, _ = gpt_neox.gpt_neox_lr(
        style="cosine", peak=1.0, low=0.1, warmup=Fraction("0.01") * 150, decay_end=150, steps=150
    )
    assert lr["warmup_until"] == "1.5 steps"


ADVISED = [key.removesuffix("*") + "x" * key.endswith("*") for key in gpt_neox._ADVICE]
READ = ["hidden_dropout", "attention_config", "split", "eval_iters", "checkpoint_factor", "save", "vocab_file", "lr"]
READ += ["fp16.enabled", "checkpoint_activations", "rms_norm_epsilon", "num_kv_heads", "weight_by_num_documents", "new"]


@given(st.sets(st.sampled_from(ADVISED + READ)), st.sampled_from([BASE, LLAMA]), st.booleans())
def test_each_key_is_in_exactly_one_list(names, base, unset):
    numbers = {
        "precision": "fp16",
        "vocab_file": "v.json",
        "save": "out",
        "split": "9,1,0",
        "attention_config": None,
        "new": 1,
    }
    keys = (
        base
        | {"new": 1}
        | {name: None if unset else numbers.get(name, False if name in gpt_neox._ADVICE else None) for name in names}
    )
    assert listed(converted(gpt_neox, keys)) == sorted(keys)
