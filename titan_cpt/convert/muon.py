"""Muon of other projects: what of it is the Muon here, and what has other numerics.

Sources: core/optimizer/muon.py and training/arguments.py of Megatron-LM core_v0.16.0 (keys of core_v0.17.0 to v0.19.0
too), muon_utils.py of NVIDIA's Emerging-Optimizers 0.1.0, which it calls, and torch.optim.Muon of torch 2.13.
"""

from __future__ import annotations

from collections.abc import Sequence

from titan_cpt.convert.conversion import Conversion

OTHER_OPTIMIZER = "only AdamW and Muon: the learning rate and weight decay need new values"
_COEFFICIENTS = (3.4445, -4.775, 2.0315)  # of every Newton-Schulz iteration here
_TORCH_EPS = 1e-7
_MEGATRON_KEYS = (
    "muon-momentum", "muon-nesterov", "muon-use-nesterov", "muon-num-ns-steps", "muon-scale-mode",
    "muon-extra-scale-factor", "muon-coefficient-type", "muon-no-split-qkv", "muon-tp-mode", "muon-fp32-matmul-prec",
    "muon-scalar-optimizer", "muon-use-syrk",
)  # fmt: skip


def set_megatron_optimizer(out: Conversion) -> None:
    """[optimizer] from --optimizer and Megatron-LM's --muon-*; the keys of AdamW's part are converted elsewhere."""
    name = out.value("optimizer", "adam")
    if name in ("muon", "dist_muon"):
        _set_megatron_muon(out)
        return
    for key in _MEGATRON_KEYS:
        if out.has(key):
            out.set({}, of=[key], text="unused there without --optimizer muon")
    if name != "adam":
        out.no_counterpart("optimizer", OTHER_OPTIMIZER)
    elif out.has("optimizer"):
        out.set("optimizer.name", "AdamW", of=["optimizer"])


def _set_megatron_muon(out: Conversion) -> None:
    text = "matrices of the blocks are under Muon, all other parameters under AdamW with the same LR, as there"
    out.set("optimizer.name", "Muon", of=["optimizer"], text=text)
    out.same("muon-momentum", "optimizer.momentum", default=0.9)
    names = ["muon-nesterov", "muon-use-nesterov"]  # core_v0.18.0 renamed it
    out.set("optimizer.nesterov", any(map(out.has, names)), of=names)
    out.same("muon-num-ns-steps", "optimizer.ns_steps", default=5)
    _scale(out)
    _iterations(out)
    _matrices(out)
    if (other := out.value("muon-scalar-optimizer", "adam")) != "adam":
        text = f"{other} for embedding, head, norms and biases there; AdamW here, whose LR needs another value"
        out.no_counterpart("muon-scalar-optimizer", text)
    elif out.has("muon-scalar-optimizer"):
        out.set({}, of=["muon-scalar-optimizer"], text="AdamW for embedding, head, norms and biases, as here")


def _scale(out: Conversion) -> None:
    """adjust_lr: spectral is sqrt(max(A, B)), shape_scaling sqrt(max(1, A / B)); both times the extra factor."""
    keys = ["muon-scale-mode", "muon-extra-scale-factor"]
    mode, factor = out.text(keys[0], "spectral"), float(out.number(keys[1], 1.0))
    if mode == "spectral" and factor == 0.2:
        out.set("optimizer.adjust_lr", "match_rms_adamw", of=keys, text="0.2 sqrt(max(rows, columns)), as there")
    elif mode == "shape_scaling" and factor == 1:
        out.set("optimizer.adjust_lr", "original", of=keys, text="sqrt(max(1, rows / columns)), as there")
    else:
        formula = {"spectral": "sqrt(max(rows, columns))", "unit_rms_norm": "sqrt(rows / columns)"}
        formula |= {"shape_scaling": "sqrt(max(1, rows / columns))"}
        text = (
            f"updates of matrices are scaled by {factor:g} x {formula.get(mode, mode)} there; here by 0.2 "
            'sqrt(max(rows, columns)), or with optimizer.adjust_lr = "original" by sqrt(max(1, rows / columns)). The '
            "learning rate cannot make up for it: it is that of AdamW's part too"
        )
        _differs(out, keys, text)


def _iterations(out: Conversion) -> None:
    """Coefficients of the Newton-Schulz iterations, and their precision."""
    key = "muon-coefficient-type"
    a, b, c = _COEFFICIENTS
    if out.value(key, "quintic") == "simple":
        out.set({}, of=[key], text=f"{a}, {b}, {c} in each iteration, as here")
    else:
        kind = out.value(key, "quintic")
        text = f"Newton-Schulz coefficients {kind} there; here {a}, {b}, {c} in each iteration: updates differ"
        _differs(out, [key], text)
    key = "muon-fp32-matmul-prec"
    if out.value(key, "medium") != "medium":
        out.no_counterpart(key, "Newton-Schulz iterations are in bfloat16 here, as with medium there")
    elif out.has(key):
        out.set({}, of=[key], text="Newton-Schulz iterations in bfloat16, as here")
    if out.has("muon-use-syrk"):
        out.set({}, of=["muon-use-syrk"], text="another kernel for the same products")


def _matrices(out: Conversion) -> None:
    """What is orthogonalized as one matrix."""
    fused, key = out.values.get("model.family") == "gpt_neox", "muon-no-split-qkv"
    if fused == out.has(key):
        if fused:
            out.set({}, of=[key], text="q, k and v are one matrix, as in family gpt_neox")
    else:
        there, here = ("separately", "as one matrix") if fused else ("as one matrix", "separately")
        family = out.values["model.family"]
        _differs(out, [key], f"q, k and v are orthogonalized {there} there, {here} in family {family}")
    if out.has("swiglu"):
        out.remark(
            "Muon: Megatron-LM has the MLP's gate and up projections in one matrix, orthogonalized and scaled as one; "
            "here they are two."
        )
    key = "muon-tp-mode"
    mode, degree = out.value(key, "blockwise"), out.whole("tensor-model-parallel-size", 1)
    if mode == "blockwise" and degree > 1:
        text = f"each of {degree} tensor-parallel ranks orthogonalizes its part of a matrix there; here it is whole"
        _differs(out, [key], text)
    elif out.has(key):
        out.set({}, of=[key], text="matrices are orthogonalized whole, as here")


def _differs(out: Conversion, keys: Sequence[str], text: str) -> None:
    """A difference without counterpart; a remark if the file does not set the keys."""
    if any(map(out.has, keys)):
        out.no_counterpart(keys, text)
    else:
        out.remark(f"{', '.join(keys)} (not set there): {text}.")


def set_torch_muon(out: Conversion, prefix: str, of: Sequence[str]) -> None:
    """[optimizer] from the arguments of torch.optim.Muon, which are bit for bit those here.

    Args:
        prefix: what the keys of the arguments begin with.
        of: keys that name the optimizer.
    """
    text = (
        "litgpt gives all parameters to torch.optim.Muon, which refuses those that are not matrices; here matrices of "
        "the blocks are under Muon, all other parameters under AdamW with the same LR: check optimizer.beta1, beta2 "
        "and eps"
    )
    out.decide(text, {"optimizer.name": "Muon"}, of=of)
    out.same(f"{prefix}momentum", "optimizer.momentum", default=0.95)
    out.same(f"{prefix}nesterov", "optimizer.nesterov", default=True)
    out.same(f"{prefix}ns_steps", "optimizer.ns_steps", default=5)
    out.same(f"{prefix}adjust_lr_fn", "optimizer.adjust_lr", default="original")
    key, values = f"{prefix}ns_coefficients", out.value(f"{prefix}ns_coefficients", _COEFFICIENTS)
    if isinstance(values, list | tuple) and tuple(values) == _COEFFICIENTS:
        if out.has(key):
            out.set({}, of=[key], text="as here")
    else:
        out.no_counterpart(key, f"always {', '.join(map(str, _COEFFICIENTS))}: updates differ")
    key = f"{prefix}eps"
    if out.number(key, _TORCH_EPS) != _TORCH_EPS:
        out.no_counterpart(key, f"smallest norm of an update there; here always {_TORCH_EPS:g}")
    elif out.has(key):
        out.set({}, of=[key], text="smallest norm of an update, as here; optimizer.eps is AdamW's")
