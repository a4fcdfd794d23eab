"""torchtitan's TOML: schedules equal its formula at every step, models have its sizes, each key is in one list."""

import math

import pytest
from converted import converted, found, learning_rates, listed, planned
from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.convert import torchtitan

BASE = {
    "model.name": "llama3",
    "model.flavor": "debugmodel",
    "training.steps": 100,
    "lr_scheduler.warmup_steps": 10,
    "optimizer.lr": 1e-3,
}


def theirs(step, *, peak, total, warmup, decay_ratio, kind, low):
    """torchtitan's LR of the step that it counts from 0, from its documentation of warmup-stable-decay."""
    decay = total - warmup if decay_ratio is None else min(round(total * decay_ratio), total - warmup)
    begin = total + 1 - decay
    if step < warmup:
        return peak * (step + 1) / warmup
    if step < begin:
        return peak
    x = (step + 1 - begin) / decay
    shape = {"linear": 1 - x, "sqrt": 1 - math.sqrt(x), "cosine": (1 + math.cos(math.pi * x)) / 2}[kind]
    return peak * (low + (1 - low) * shape)


@pytest.mark.parametrize("kind", ["linear", "sqrt", "cosine"])
@pytest.mark.parametrize("decay_ratio", [None, 0.1, 0.5])
@pytest.mark.parametrize("low", [0.0, 0.1])
@pytest.mark.parametrize("warmup", [0, 1, 20])
def test_every_step_has_the_learning_rate_of_torchtitan(kind, decay_ratio, low, warmup):
    keys = {"lr_scheduler.warmup_steps": warmup, "lr_scheduler.decay_type": kind, "lr_scheduler.min_lr_factor": low}
    keys |= {} if decay_ratio is None else {"lr_scheduler.decay_ratio": decay_ratio}
    conversion = converted(torchtitan, BASE | keys)
    expected = [
        theirs(step, peak=1e-3, total=100, warmup=warmup, decay_ratio=decay_ratio, kind=kind, low=low)
        for step in range(100)
    ]
    assert learning_rates(conversion, at=range(1, 101)) == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_a_linear_decay_keeps_the_number_of_steps_and_others_have_one_more_because_theirs_ends_after_the_last_step():
    assert planned(converted(torchtitan, BASE))[1].stages[0].steps == 100
    cosine = converted(torchtitan, BASE | {"lr_scheduler.decay_type": "cosine"})
    assert planned(cosine)[1].stages[0].steps == 101
    assert "one step after" in found(cosine.decisions, "lr_scheduler.decay_type").text


def test_a_schedule_longer_than_the_run_keeps_its_learning_rates():
    conversion = converted(torchtitan, BASE | {"lr_scheduler.total_steps": 400, "lr_scheduler.warmup_steps": 10})
    expected = [
        theirs(step, peak=1e-3, total=400, warmup=10, decay_ratio=None, kind="linear", low=0.0) for step in range(100)
    ]
    assert planned(conversion)[1].stages[0].steps == 100
    assert learning_rates(conversion, at=range(1, 101)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "flavor", "size"),
    [("llama3", "8B", "llama3.1-8b"), ("llama3", "405B", "llama3.1-405b"), ("qwen3", "0.6B", "qwen3-0.6b")],
)
def test_released_models_become_the_named_size_without_further_keys(name, flavor, size):
    conversion = converted(torchtitan, BASE | {"model.name": name, "model.flavor": flavor})
    model = {key: value for key, value in conversion.values.items() if key.startswith("model.")}
    assert model == {"model.family": "llama", "model.size": size}
    assert conversion.same_architecture


@pytest.mark.parametrize("flavor", ["8B_flex", "8B_varlen", "debugmodel_flex_attn"])
def test_flavors_with_block_causal_attention_have_a_document_mask(flavor):
    """torchtitan 0.2.2: attention inside documents, which include their last token; no positions restart."""
    conversion = converted(torchtitan, BASE | {"model.flavor": flavor})
    stage = planned(conversion)[1].stages[0]
    assert (stage.document_mask, stage.document_positions) == (True, False)
    assert not planned(converted(torchtitan, BASE))[1].stages[0].document_mask


def test_a_model_with_experts_is_a_placeholder_and_says_so():
    conversion = converted(torchtitan, BASE | {"model.name": "qwen3", "model.flavor": "debugmodel_moe"})
    assert not conversion.same_architecture
    assert "another architecture" in found(conversion.unmatched, "model.flavor").text
    planned(conversion)


def test_the_global_batch_is_the_local_one_times_the_data_parallel_ranks():
    keys = BASE | {"training.local_batch_size": 4, "parallelism.tensor_parallel_degree": 2}
    assert converted(torchtitan, keys, world_size=16).values["training.global_batch_size"] == 4 * 16 / 2
    keys |= {"parallelism.data_parallel_shard_degree": 4, "parallelism.data_parallel_replicate_degree": 2}
    assert converted(torchtitan, keys).values["training.global_batch_size"] == 4 * 4 * 2
    keys |= {"training.global_batch_size": 64}
    assert converted(torchtitan, keys).values["training.global_batch_size"] == 64


def test_float8_is_converted_only_if_it_is_among_the_converters():
    keys = BASE | {"quantize.linear.float8.recipe_name": "rowwise", "quantize.linear.float8.filter_fqns": ["output"]}
    assert not any(key.startswith("float8") for key in converted(torchtitan, keys).values)
    values = converted(torchtitan, keys | {"model.converters": ["float8"]}).values
    assert values["float8.recipe_name"] == "rowwise"
    assert values["float8.filter_fqns"] == ["output"]


KEYS = st.sampled_from([theirs for theirs, _, _ in torchtitan._SAME if "degree" not in theirs and "mode" not in theirs])
OTHERS = st.sampled_from([key.removesuffix("*") + "x" * key.endswith("*") for key in torchtitan._ADVICE])
SPECIAL = st.sampled_from([
    "debug.seed", "model.converters", "compile.enable", "compile.components", "checkpoint.enable", "validation.freq",
    "validation.enable", "lr_scheduler.decay_ratio", "optimizer.name", "training.dataset", "made.up", "made_up",
])  # fmt: skip


@given(st.sets(KEYS | OTHERS | SPECIAL), st.booleans())
def test_each_key_is_in_exactly_one_list(names, unset):
    keys = BASE | dict.fromkeys(names - set(BASE))
    keys |= {} if unset else {name: ["x"] for name in names if name in torchtitan._ADVICE or name.startswith("made")}
    assert listed(converted(torchtitan, keys)) == sorted(keys)
