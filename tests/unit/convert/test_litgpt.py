"""litgpt's pretraining YAML: its schedule, steps and batch, its model names and fields, each key in one list."""

import math

import pytest
from converted import converted, found, learning_rates, listed, planned
from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.convert import litgpt

BASE = {
    "model_name": "pythia-14m", "train.global_batch_size": 32, "train.micro_batch_size": 4, "devices": 2,
    "train.max_seq_length": 512, "train.max_tokens": 100 * 32 * 512, "train.lr_warmup_steps": 10, "train.min_lr": 6e-5,
    "train.max_norm": 1.0, "optimizer.class_path": "torch.optim.AdamW", "optimizer.init_args.lr": 6e-4,
    "optimizer.init_args.betas": [0.9, 0.95], "optimizer.init_args.weight_decay": 0.1, "precision": "bf16-mixed",
}  # fmt: skip
FIELDS = {
    "n_layer": 6, "n_embd": 288, "n_head": 6, "n_query_groups": 6, "head_size": 48, "rotary_percentage": 1.0,
    "parallel_residual": False, "bias": False, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP",
    "intermediate_size": 768, "block_size": 256, "padded_vocab_size": 32_000, "name": "stories15M", "hf_config": {},
}  # fmt: skip


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_step_n_has_the_learning_rate_of_a_fraction_of_a_step_earlier(devices):
    """litgpt computes the LR per micro-batch; the last one of step n has number n x accumulation - 1, from 0."""
    conversion = converted(litgpt, BASE | {"devices": devices})
    accumulation = 32 // devices // 4
    warmup, end = 10 * accumulation, 100 * accumulation
    steps, expected = [1, 2, 9, 10, 11, 50, 99, 100], []
    for step in steps:
        i = step * accumulation - 1
        cosine = 6e-5 + (6e-4 - 6e-5) * (1 + math.cos(math.pi * (i - warmup) / (end - warmup))) / 2
        expected.append(6e-4 * i / warmup if i < warmup else cosine)
    at = [step - 1 / accumulation for step in steps]
    assert learning_rates(conversion, at=at) == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert any(f"n - 1/{accumulation} here" in finding.text for finding in conversion.decisions)


def test_the_token_budget_becomes_the_same_whole_steps():
    conversion = converted(litgpt, BASE | {"train.max_tokens": 100 * 32 * 512 + 31 * 512})
    plan = planned(conversion)[1]
    assert (plan.stages[0].steps, plan.step_tokens) == (100, 32 * 512)


def test_the_global_batch_is_what_litgpt_rounds_it_down_to():
    """30 sequences on 2 devices are 15 each, 3 micro-batches of 4: 24 in all."""
    assert converted(litgpt, BASE | {"train.global_batch_size": 30}).values["training.global_batch_size"] == 24


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("pythia-14m", "14m"),
        ("Llama-2-7b-chat-hf", "llama2-7b"),
        ("Llama-3.2-1B", "llama3.2-1b"),
        ("Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("Mistral-7B-v0.1", "mistral-7b"),
    ],
)
def test_model_names_become_named_sizes(name, size):
    conversion = converted(litgpt, BASE | {"model_name": name})
    assert conversion.values["model.size"] == size
    assert {key for key in conversion.values if key.startswith("model.")} == {"model.family", "model.size"}


def test_an_unknown_model_name_is_a_placeholder():
    conversion = converted(litgpt, BASE | {"model_name": "falcon-7b"})
    assert "placeholder" in found(conversion.unmatched, "model_name").text
    planned(conversion)


def test_fields_of_a_model_are_taken_over():
    conversion = converted(litgpt, BASE | {f"model_config.{key}": value for key, value in FIELDS.items()})
    spec = planned(conversion)[1].spec
    assert (spec.layers, spec.width, spec.heads, spec.mlp_width, spec.vocab_size) == (6, 288, 6, 768, 32_000)
    assert conversion.same_architecture


def test_llama_3s_rope_scaling_is_taken_over_and_linear_interpolation_is_another_architecture():
    """litgpt's Llama-3.2 has all four numbers, its Gemma 3 only a factor."""
    fields = {f"model_config.{key}": value for key, value in FIELDS.items()}
    scaling = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}
    adjusted = {f"model_config.rope_adjustments.{key}": value for key, value in scaling.items()}
    llama3 = converted(litgpt, BASE | fields | adjusted)
    spec = planned(llama3)[1].spec

    assert llama3.same_architecture
    assert (spec.rope_scaling.kind, spec.rope_scaling.factor, spec.rope_scaling.original_seq_len) == (
        "llama3",
        32,
        8192,
    )
    for linear in ({"model_config.rope_adjustments.factor": 8.0}, {"model_config.rope_condense_ratio": 4}):
        conversion = converted(litgpt, BASE | fields | linear)
        assert not conversion.same_architecture
        assert listed(conversion) == sorted(BASE | fields | linear)


def test_a_sequence_length_that_is_not_set_is_the_models_block_size():
    keys = {key: value for key, value in BASE.items() if key != "train.max_seq_length"}
    assert converted(litgpt, keys).values["training.seq_len"] == 512
    fields = {f"model_config.{key}": value for key, value in FIELDS.items()}
    assert converted(litgpt, keys | fields).values["training.seq_len"] == 256


NAMES = [key.removesuffix("*") + "x" * key.endswith("*") for key in litgpt._ADVICE]
NAMES += [
    "seed",
    "out_dir",
    "data",
    "tokenizer_dir",
    "initial_checkpoint_dir",
    "eval.interval",
    "eval.max_iters",
    "new",
]
NAMES += ["train.tie_embeddings", "train.log_interval", "train.save_interval", "optimizer.init_args.fused"]
NAMES += ["model_config.rope_adjustments", "model_config.rope_adjustments.factor", "model_config.rope_condense_ratio"]


@given(st.sets(st.sampled_from(NAMES)), st.sets(st.sampled_from(sorted(FIELDS))), st.booleans())
def test_each_key_is_in_exactly_one_list(names, fields, unset):
    keys = BASE | dict.fromkeys(names - set(BASE))
    keys |= {} if unset else {name: "x" for name in names if name in ("data", "out_dir", "tokenizer_dir", "new")}
    keys |= {f"model_config.{name}": FIELDS[name] for name in fields}
    assert listed(converted(litgpt, keys)) == sorted(keys)
