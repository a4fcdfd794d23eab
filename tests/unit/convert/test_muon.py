"""Muon of Megatron-LM, litgpt, torchtitan and GPT-NeoX: what is the same here is converted, all else is named."""

import math

import pytest
from converted import converted, found, listed, planned

from titan_cpt.convert import gpt_neox, litgpt, megatron, torchtitan
from titan_cpt.training.optimization.newton_schulz import COEFFICIENTS, SMALLEST_NORM, lr_factor

MEGATRON = {
    "num-layers": "4", "hidden-size": "256", "num-attention-heads": "8", "position-embedding-type": "rope",
    "untie-embeddings-and-output-weights": True, "hidden-dropout": "0", "attention-dropout": "0.0",
    "seq-length": "512", "micro-batch-size": "2", "global-batch-size": "8", "train-iters": "1000", "lr": "3e-4",
    "min-lr": "3e-5", "bf16": True,
}  # fmt: skip
GPT = MEGATRON | {"optimizer": "muon"}
LLAMA = GPT | {"swiglu": True, "normalization": "RMSNorm", "disable-bias-linear": True}
SAME = {"muon-scale-mode": "spectral", "muon-extra-scale-factor": "0.2", "muon-coefficient-type": "simple"}
LITGPT = {"model_name": "pythia-14m", "train.max_tokens": 10**8, "optimizer.init_args.lr": 6e-4}
TORCH_MUON = LITGPT | {"optimizer.class_path": "torch.optim.Muon"}


def remarks(conversion):
    return " ".join(finding.text for finding in conversion.decisions if not finding.keys)


@pytest.mark.parametrize("name", ["muon", "dist_muon"])
@pytest.mark.parametrize("nesterov", ["muon-nesterov", "muon-use-nesterov"])
def test_megatrons_keys_become_those_of_the_same_meaning(name, nesterov):
    keys = LLAMA | SAME | {"optimizer": name, "muon-momentum": "0.97", nesterov: True, "muon-num-ns-steps": "7"}
    keys |= {"adam-beta1": "0.8", "adam-beta2": "0.9", "adam-eps": "1e-6", "weight-decay": "0.05"}
    ours = planned(converted(megatron, keys))[0].optimizer
    assert (ours.name, ours.momentum, ours.nesterov, ours.ns_steps) == ("Muon", 0.97, True, 7)
    assert (ours.beta1, ours.beta2, ours.eps, ours.weight_decay) == (0.8, 0.9, 1e-6, 0.05)
    assert listed(converted(megatron, keys)) == sorted(keys)


def test_what_a_script_does_not_set_has_megatrons_defaults():
    ours = planned(converted(megatron, LLAMA))[0].optimizer
    assert (ours.name, ours.momentum, ours.nesterov, ours.ns_steps) == ("Muon", 0.9, False, 5)


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (64, 256), (256, 64)])
def test_a_scale_is_converted_where_it_is_the_same_for_every_shape(rows, columns):
    """Formulas of get_muon_scale_factor of Emerging-Optimizers 0.1.0."""
    spectral, shape = math.sqrt(max(rows, columns)), max(1, rows / columns) ** 0.5
    for mode, extra, theirs in (("spectral", "0.2", 0.2 * spectral), ("shape_scaling", "1.0", shape)):
        keys = LLAMA | {"muon-scale-mode": mode, "muon-extra-scale-factor": extra}
        adjust = converted(megatron, keys).values["optimizer.adjust_lr"]
        assert lr_factor(rows, columns, adjust) == pytest.approx(theirs, rel=1e-15)


@pytest.mark.parametrize("scale", [("spectral", "1.0"), ("shape_scaling", "0.2"), ("unit_rms_norm", "1.0")])
def test_another_scale_is_named_and_not_converted(scale):
    keys = LLAMA | {"muon-scale-mode": scale[0], "muon-extra-scale-factor": scale[1]}
    conversion = converted(megatron, keys)
    assert "cannot make up for it" in found(conversion.unmatched, "muon-scale-mode").text
    assert "optimizer.adjust_lr" not in conversion.values
    assert listed(conversion) == sorted(keys)


def test_differences_that_are_megatrons_defaults_are_remarks():
    """Scale 1, other coefficients, parts of matrices under tensor parallelism, and SwiGLU's two matrices as one."""
    said = remarks(converted(megatron, LLAMA | {"tensor-model-parallel-size": "2"}))
    for words in ("scaled by 1 x sqrt", "coefficients quintic there", "each of 2 tensor-parallel", "gate and up"):
        assert words in said
    said = remarks(converted(megatron, LLAMA | SAME))
    assert "gate and up" in said
    for words in ("scaled by", "coefficients", "tensor-parallel ranks", "q, k and v"):
        assert words not in said


@pytest.mark.parametrize("keys", [LLAMA, GPT], ids=["llama", "gpt_neox"])
@pytest.mark.parametrize("split", [True, False])
def test_q_k_and_v_are_the_same_matrices_only_in_one_of_two_cases(keys, split):
    """They are three matrices in family llama, one in gpt_neox; Megatron-LM splits its one by default."""
    conversion = converted(megatron, keys | ({} if split else {"muon-no-split-qkv": True}))
    said = remarks(conversion) + " ".join(finding.text for finding in conversion.unmatched)
    assert ("q, k and v are orthogonalized" in said) == (split == (keys is GPT))


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("muon-coefficient-type", "polar_express", False),
        ("muon-coefficient-type", "simple", True),
        ("muon-fp32-matmul-prec", "high", False),
        ("muon-fp32-matmul-prec", "medium", True),
        ("muon-scalar-optimizer", "lion", False),
        ("muon-scalar-optimizer", "adam", True),
        ("muon-tp-mode", "blockwise", False),
        ("muon-tp-mode", "duplicated", True),
        ("muon-use-syrk", True, True),
        ("muon-something-new", "1", False),
    ],
)
def test_each_other_key_is_the_same_or_without_counterpart(key, value, same):
    keys = LLAMA | {"tensor-model-parallel-size": "2", key: value}
    conversion = converted(megatron, keys)
    assert found(conversion.converted if same else conversion.unmatched, key)
    assert listed(conversion) == sorted(keys)


def test_muons_keys_without_muon_change_nothing():
    keys = MEGATRON | {"optimizer": "adam", "muon-momentum": "0.8", "muon-scale-mode": "spectral"}
    conversion = converted(megatron, keys)
    assert "unused there" in found(conversion.converted, "muon-momentum").text
    assert conversion.values == converted(megatron, MEGATRON | {"optimizer": "adam"}).values


@pytest.mark.parametrize("name", ["sgd", "adaptive_muon", "soap"])
def test_an_optimizer_of_another_kind_says_which_two_there_are(name):
    conversion = converted(megatron, MEGATRON | {"optimizer": name})
    assert "only AdamW and Muon" in found(conversion.unmatched, "optimizer").text


def test_torchs_muon_in_a_file_of_litgpt_has_torchs_defaults():
    conversion = converted(litgpt, TORCH_MUON)
    ours = planned(conversion)[0].optimizer
    assert (ours.name, ours.momentum, ours.nesterov, ours.ns_steps) == ("Muon", 0.95, True, 5)
    assert (ours.adjust_lr, ours.weight_decay) == ("original", 0.1)
    assert "refuses those that are not matrices" in found(conversion.decisions, "optimizer.class_path").text


def test_arguments_of_torchs_muon_in_a_file_of_litgpt_are_kept():
    """Its eps is a smallest norm, and not that of AdamW."""
    given = {"momentum": 0.9, "nesterov": False, "ns_steps": 6, "adjust_lr_fn": "match_rms_adamw"}
    given |= {"weight_decay": 0.2, "ns_coefficients": list(COEFFICIENTS), "eps": SMALLEST_NORM}
    keys = TORCH_MUON | {f"optimizer.init_args.{name}": value for name, value in given.items()}
    conversion = converted(litgpt, keys)
    ours = planned(conversion)[0].optimizer
    assert (ours.momentum, ours.nesterov, ours.ns_steps, ours.adjust_lr) == (0.9, False, 6, "match_rms_adamw")
    assert (ours.weight_decay, ours.eps) == (0.2, 1e-8)
    assert listed(conversion) == sorted(keys)


def test_other_coefficients_or_another_smallest_norm_of_torchs_muon_have_no_counterpart():
    other = {"optimizer.init_args.ns_coefficients": [2.0, -1.5, 0.5], "optimizer.init_args.eps": "1e-8"}
    conversion = converted(litgpt, TORCH_MUON | other)
    for key in other:
        assert found(conversion.unmatched, key)
    assert listed(conversion) == sorted(TORCH_MUON | other)


@pytest.mark.parametrize(
    ("module", "key", "name"),
    [
        (litgpt, "optimizer.class_path", "dion.Muon"),
        (gpt_neox, "optimizer.type", "Muon"),
        (torchtitan, "optimizer.name", "Muon"),
        (torchtitan, "optimizer.name", "DistMuon"),
    ],
)
def test_a_muon_of_unknown_numerics_is_not_converted(module, key, name):
    """litgpt loads any class; torchtitan 0.2 and GPT-NeoX have none of this name."""
    conversion = converted(module, {key: name})
    assert "Muon" in found(conversion.unmatched, key).text
    assert "optimizer.name" not in conversion.values
