"""Megatron-LM's arguments: schedules equal its formula, model, data, batch, each argument in one list."""

import math

import pytest
from converted import converted, found, learning_rates, listed, planned
from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.convert import megatron

BASE = {
    "num-layers": "4", "hidden-size": "256", "num-attention-heads": "8", "ffn-hidden-size": "704", "swiglu": True,
    "normalization": "RMSNorm", "position-embedding-type": "rope", "disable-bias-linear": True,
    "untie-embeddings-and-output-weights": True, "hidden-dropout": "0", "attention-dropout": "0.0",
    "seq-length": "512", "micro-batch-size": "2", "global-batch-size": "8", "train-iters": "1000", "lr": "3e-4",
    "min-lr": "3e-5", "bf16": True,
}  # fmt: skip


def theirs(n, *, style, peak, low, warmup, decay, wsd=0, shape="linear"):
    """Megatron-LM's LR after n iterations, n counted from 0."""
    if warmup and n <= warmup:
        return peak * n / warmup
    if style == "constant":
        return peak
    if n > decay:
        return low
    if style == "inverse-square-root":
        return max(low, peak * math.sqrt(max(8 * warmup, 1) / max(8 * n, 1)))  # in sequences, 8 a step
    x = (n - warmup) / (decay - warmup)
    if style == "WSD":
        x, style = max(0.0, (n - (decay - wsd)) / wsd), shape
    left = {"linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2, "minus_sqrt": 1 - math.sqrt(x)}[style]
    return low + (peak - low) * left


@pytest.mark.parametrize("style", ["linear", "cosine", "constant", "inverse-square-root"])
@pytest.mark.parametrize("warmup", [0, 10, 100])
def test_step_n_of_megatron_has_the_learning_rate_of_step_n_minus_1_here(style, warmup):
    conversion = converted(megatron, BASE | {"lr-decay-style": style, "lr-warmup-iters": str(warmup)})
    after = [1, 5, 10, 11, 100, 101, 500, 999]
    expected = [theirs(n, style=style, peak=3e-4, low=3e-5, warmup=warmup, decay=1000) for n in after]
    if style == "inverse-square-root" and warmup == 0:
        assert "one sequence earlier" in found(conversion.decisions, "lr-decay-style").text
        after = [n - 1 / 8 for n in after]
    assert learning_rates(conversion, at=after) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", ["linear", "cosine", "minus_sqrt"])
def test_a_wsd_schedule_is_the_same_in_every_step(shape):
    keys = {"lr-decay-style": "WSD", "lr-wsd-decay-iters": "200", "lr-wsd-decay-style": shape, "lr-warmup-iters": "10"}
    expected = [
        theirs(n, style="WSD", peak=3e-4, low=3e-5, warmup=10, decay=1000, wsd=200, shape=shape) for n in range(1, 1001)
    ]
    assert learning_rates(converted(megatron, BASE | keys), at=range(1, 1001)) == pytest.approx(expected, rel=1e-12)


def test_an_exponential_wsd_decay_is_a_decision_and_as_far_apart_as_the_list_says():
    keys = {"lr-decay-style": "WSD", "lr-wsd-decay-iters": "200", "lr-wsd-decay-style": "exponential"}
    conversion = converted(megatron, BASE | keys)
    here = learning_rates(conversion, at=range(801, 1001))
    there = [3e-5 + 2.7e-4 * (2 * 0.5 ** (k / 200) - 1) for k in range(1, 201)]
    assert "within 9 %" in found(conversion.decisions, "lr-wsd-decay-style").text
    assert 0.08 < max(abs(a - b) for a, b in zip(here, there, strict=True)) / 2.7e-4 < 0.09


def test_a_cosine_that_ends_before_training_stays_at_min_lr():
    conversion = converted(megatron, BASE | {"lr-decay-style": "cosine", "lr-decay-iters": "400"})
    after = [1, 200, 400, 401, 1000]
    expected = [theirs(n, style="cosine", peak=3e-4, low=3e-5, warmup=0, decay=400) for n in after]
    assert learning_rates(conversion, at=after) == pytest.approx(expected, rel=1e-12)


def test_samples_are_converted_to_steps():
    keys = {key: value for key, value in BASE.items() if key != "train-iters"}
    keys |= {"train-samples": "8004", "lr-decay-samples": "8004", "lr-warmup-samples": "84", "lr-decay-style": "linear"}
    conversion = converted(megatron, keys)
    assert planned(conversion)[1].stages[0].steps == 1000
    assert learning_rates(conversion, at=[10.5]) == pytest.approx([3e-4])


def test_the_model_is_the_same_if_every_part_of_it_is():
    conversion = converted(megatron, BASE)
    spec = planned(conversion)[1].spec
    assert (spec.layers, spec.width, spec.heads, spec.mlp_width, spec.head_width) == (4, 256, 8, 704, 32)
    assert conversion.same_architecture


@pytest.mark.parametrize(
    "missing", ["normalization", "position-embedding-type", "disable-bias-linear", "hidden-dropout"]
)
def test_megatrons_defaults_are_another_architecture(missing):
    """LayerNorm, learned positions, biases and a dropout of 0.1."""
    conversion = converted(megatron, {key: value for key, value in BASE.items() if key != missing})
    assert not conversion.same_architecture
    assert any(missing in finding.text and "their default" in finding.text for finding in conversion.decisions)


def test_the_global_batch_is_the_micro_batch_times_the_data_parallel_ranks_if_it_is_not_given():
    keys = {key: value for key, value in BASE.items() if key != "global-batch-size"}
    keys |= {"nproc_per_node": "8", "nnodes": "2", "tensor-model-parallel-size": "4"}
    assert converted(megatron, keys).values["training.global_batch_size"] == 2 * 16 // 4
    assert converted(megatron, keys, world_size=64).values["training.global_batch_size"] == 2 * 64 // 4


def test_weights_and_prefixes_alternate_in_data_path():
    conversion = converted(megatron, BASE | {"data-path": ["0.3", "a/x", "0.7", "b/y"]})
    domains = planned(conversion)[0].datasets["data"].domains
    assert {domain.train[0]: domain.weight for domain in domains.values()} == {"a/x": 0.3, "b/y": 0.7}


def test_a_variable_that_the_script_does_not_set_is_a_decision():
    conversion = converted(megatron, BASE | {"data-path": "$1"})
    assert "variable" in found(conversion.decisions, "data-path").text
    planned(conversion)


def test_attention_inside_documents_is_a_decision_where_megatron_did_not_apply_it():
    """Transformer Engine's layers, the default, ignore the mask (NVIDIA/Megatron-LM issue 2357); local ones do not."""
    mask = BASE | {"reset-attention-mask": True, "reset-position-ids": True, "eod-mask-loss": True}
    default, local = converted(megatron, mask), converted(megatron, mask | {"transformer-impl": "local"})

    assert "issue 2357" in found(default.decisions, "reset-attention-mask").text
    assert "that it ends" in found(local.converted, "reset-attention-mask").text
    for conversion in (default, local):
        stage = planned(conversion)[1].stages[0]
        assert (stage.document_mask, stage.document_positions) == (True, False)
        assert "positions do not restart" in found(conversion.converted, "reset-position-ids").text
        assert "best_fit" in found(conversion.unmatched, "eod-mask-loss").text
    assert not planned(converted(megatron, BASE))[1].stages[0].document_mask


@pytest.mark.parametrize("swiglu", [True, False])
def test_llama_3s_rope_scaling_is_that_of_both_families(swiglu):
    """Its constants are 8192, 1 and 4 in Megatron-LM; other changes of RoPE are other architectures."""
    keys = {key: value for key, value in BASE.items() if swiglu or key not in ("swiglu", "disable-bias-linear")}
    keys |= {"normalization": "RMSNorm" if swiglu else "LayerNorm", "use-rope-scaling": True}
    conversion = converted(megatron, keys | {"rope-scaling-factor": "32.0"})
    scaling = planned(conversion)[1].spec.rope_scaling

    assert conversion.same_architecture
    assert (scaling.kind, scaling.factor, scaling.original_seq_len) == ("llama3", 32, 8192)
    assert (scaling.low_freq_factor, scaling.high_freq_factor) == (1, 4)
    for other in ({"rotary-seq-len-interpolation-factor": "2"}, {"no-rope-freq": "4"}):
        assert not converted(megatron, keys | other).same_architecture


NAMES = [key.removesuffix("*") + "x" * key.endswith("*") for key in megatron._ADVICE]
NAMES += ["data-path", "split", "tokenizer-model", "save", "fp16", "eval-iters", "group-query-attention", "num-experts"]
NAMES += ["use-rope-scaling", "qk-layernorm", "vocab-size", "optimizer", "recompute-activations", "made-up"]
NAMES += ["reset-attention-mask", "reset-position-ids", "rampup-batch-size", "no-rope-freq", "train-samples"]


@given(st.sets(st.sampled_from(NAMES)), st.booleans())
def test_each_argument_is_in_exactly_one_list(names, swiglu):
    keys = {key: value for key, value in BASE.items() if swiglu or key != "swiglu"}
    keys |= {"optimizer": "sgd"} if "optimizer" in names else {}
    keys |= {name: "x/y" if name in ("data-path", "save") else True for name in names - {"optimizer", "kv-channels"}}
    keys |= {"train-samples": "8000"} if "train-samples" in names else {}
    assert listed(converted(megatron, keys)) == sorted(keys)
