"""Every layout gives the numbers of one process: three steps of the real trainer from one seed on real batches."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_launch import launch, make_inputs, record
from parity_layouts import (
    CASES,
    FLOAT8,
    FLOAT8_REFERENCES,
    HANDED_ON,
    IS_OLD_TORCH,
    LENGTHS,
    NEW_WEIGHTS,
    QUICKSTART,
    REFERENCES,
    Case,
)
from training import once_for_all_workers, tensors_of

from titan_cpt.config.load import load_config
from titan_cpt.models.build import build_model
from titan_cpt.planning.model_spec import unsplit_spec

TWO_STAGES = sorted({saves.against for saves, _ in HANDED_ON})
WORLD_SIZES = sorted({case.world_size for case in CASES})
# Nats per token for losses, relative for gradient norms; float8 itself is within 5e-2 of the others here.
TOLERANCE = {"float32": 1e-5, "Muon": 1e-4, "bfloat16": 2e-3, "float8, one scale": 2e-3, "float8": 2e-2}
# Relative, of each parameter by itself. A last bit may turn how a number is rounded to float8.
MOMENT_TOLERANCE = {"float32": 1e-3, "Muon": 1e-2, "bfloat16": 1e-1, "float8, one scale": 1e-1, "float8": 2e-1}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, with those of one process."""
    return once_for_all_workers(tmp_path_factory.getbasetemp(), "parity", make_runs)


def make_runs(folder: Path) -> None:
    """Inputs, and the runs of one process."""
    make_inputs(folder)
    runs = [{"job.name": name, **overrides} for name, overrides in REFERENCES.items()]
    runs += [{"job.name": f"{name}-two-stages", **in_two_stages(REFERENCES[name])} for name in TWO_STAGES]
    runs += [{"job.name": case.name, **case.overrides} for case in (*CASES, *LENGTHS) if case.world_size == 1]
    launch(folder, runs, 1)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_layout_gives_the_numbers_of_one_process(world_size: int, folder: Path) -> None:
    """Losses, gradient norms, each parameter's, validation, hashes of the batches: all layouts of a world size."""
    cases = [case for case in (*CASES, *LENGTHS, *QUICKSTART) if case.world_size == world_size and case.runs_here]
    if world_size > 1:
        launch(folder, [{"job.name": case.name, **case.overrides} for case in cases], world_size)

    faults = [fault for case in cases for fault in faults_of(case, folder)]
    assert not faults, "\n".join(faults)


def test_every_layout_reads_the_checkpoint_of_any_other(folder: Path) -> None:
    """A second stage with the optimizer kept, under another layout than the first, continues as one process would.

    So do two stages of one run, where the manifest between them takes as long to write as a large model's.
    """
    runs = [{"job.name": "slowly-sealed", "seal_s": "1.5", **in_two_stages(HANDED_ON[0][0].overrides)}]
    for number, (saves, reads) in enumerate(HANDED_ON):
        runs += [{"job.name": f"handed-{number}", **saves.overrides}]
        runs += [{"job.name": f"handed-{number}", **in_two_stages(reads.overrides)}]
    runs += [{"job.name": "handed-to-one", **HANDED_ON[1][0].overrides}]
    launch(folder, runs, 4, "handed")
    launch(folder, [{"job.name": "handed-to-one", **in_two_stages({})}], 1, "handed-to-one")

    against = {f"handed-{number}": saves.against for number, (saves, _) in enumerate(HANDED_ON)}
    against |= {"handed-to-one": "one", "slowly-sealed": "one"}
    cases = [Case(name, 4, against=f"{reference}-two-stages") for name, reference in against.items()]
    faults = [fault for case in cases for fault in faults_of(case, folder)]
    assert not faults, "\n".join(faults)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_float8_on_several_ranks_gives_the_losses_of_one_process_in_float8(folder: Path) -> None:
    """Layouts agree within rounding, float8 is close to fp32 and bf16, and checkpoints hold no float8 tensor."""
    alone = [{"job.name": name, **overrides} for name, overrides in FLOAT8_REFERENCES.items()]
    launch(folder, [*alone, {"job.name": "new-weights-one", **NEW_WEIGHTS}], 1, "float8-1")
    cases = [case for case in FLOAT8 if case.runs_here]
    ranks = [{"job.name": case.name, **case.overrides} for case in cases]
    gathered = {} if IS_OLD_TORCH else {"float8.enable_fsdp_float8_all_gather": "true"}
    launch(folder, [*ranks, {"job.name": "new-weights", **NEW_WEIGHTS, **gathered}], 2, "float8-2")

    faults = [fault for case in cases for fault in faults_of(case, folder)]
    assert not faults, "\n".join(faults)
    for name in FLOAT8_REFERENCES:
        plain = "one-bf16" if name.endswith("bf16") else "one"
        pairs = zip(losses(folder, name), losses(folder, plain), strict=True)
        assert 1e-4 < max(abs(ours - theirs) for ours, theirs in pairs) < 5e-2, name
    begun, one = (
        next(line for line in record(folder, name) if line["kind"] == "validation" and line["stage"] == "second")
        for name in ("new-weights", "new-weights-one")
    )
    assert begun["loss_nats_per_token"] == pytest.approx(one["loss_nats_per_token"], abs=1e-5)  # the scales are new too
    assert "float8 is emulated on a CPU" in (folder / "output-float8-1.txt").read_text()
    files = [path for path in (folder / "outputs" / cases[1].name).glob("*/step-*/*") if path.is_file()]
    assert files
    assert not any(b"torchao" in path.read_bytes() for path in files)


def losses(folder: Path, name: str) -> list[float]:
    """The training losses of a run."""
    return [line["loss_nats_per_token"] for line in record(folder, name) if line["kind"] == "train"]


def in_two_stages(overrides: dict[str, str]) -> dict[str, str]:
    """These overrides over the TOML that continues where theirs ends."""
    return {**overrides, "toml": f"{overrides.get('toml', 'gpt_neox')}-two-stages"}


def faults_of(case: Case, folder: Path) -> list[str]:
    """Where a case's numbers are not those of one process."""
    tolerance = TOLERANCE[case.precision]
    ours, theirs = (record(folder, name) for name in (case.name, case.against))
    faults = []
    for kind, keys in (("train", ("loss_nats_per_token", "grad_norm")), ("validation", ("loss_nats_per_token",))):
        mine, one = ([line for line in lines if line["kind"] == kind] for lines in (ours, theirs))
        if len(mine) != len(one) or not one:
            faults.append(f"{case.name}: {len(mine)} lines of kind {kind}, not {len(one)}")
        for m, o in zip(mine, one, strict=False):
            for key in keys:
                allowed = tolerance * (o[key] if key == "grad_norm" else 1.0)
                if not abs(m[key] - o[key]) <= allowed:
                    faults.append(f"{case.name}: {kind} step {o['step']}: {key} is {m[key]}, not {o[key]}")
            if m.get("batch_hash") != o.get("batch_hash"):
                faults.append(f"{case.name}: step {o['step']}: another global batch")
            if kind == "train":
                faults += source_faults(case, m, o)
    return [*faults, *moment_faults(case, folder), *frozen_faults(case, folder)]


def source_faults(case: Case, ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Where a step's losses by source are not those of one process, or their mean over all tokens is not the loss."""
    faults = []
    total = nats = 0.0
    for prefix in ("", "replay_"):
        tokens, losses = (ours.get(f"{prefix}{what}_by_source", {}) for what in ("tokens", "loss"))
        one = theirs.get(f"{prefix}loss_by_source", {})
        if tokens != theirs.get(f"{prefix}tokens_by_source", {}) or not losses.keys() == one.keys() == tokens.keys():
            faults.append(f"{case.name}: step {ours['step']}: {prefix}tokens by source are {tokens}")
        for name in losses.keys() & one.keys():
            if not abs(losses[name] - one[name]) <= 2 * TOLERANCE[case.precision]:
                faults.append(f"{case.name}: step {ours['step']}: {prefix}loss of {name} is not {one[name]}")
        total += sum(tokens.values())
        nats += sum(losses[name] * tokens[name] for name in losses)
    if not total or not abs(nats / total - ours["loss_nats_per_token"]) <= 1e-5:
        faults.append(f"{case.name}: step {ours['step']}: the sources have {nats} nats in {total} tokens")
    return faults


def moment_faults(case: Case, folder: Path) -> list[str]:
    """Parameters whose mean gradients are not those of one process.

    The gradients of a Qwen3's head norms are 1e-5 of the whole norm, and Adam hides a gradient's scale from the losses.
    """
    ours, theirs = (last_moments(folder, name) for name in (case.name, case.against))
    assert ours.keys() == theirs.keys(), f"{case.name}: {sorted(ours.keys() ^ theirs.keys())}"
    errors = {name: float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours}
    tolerance = MOMENT_TOLERANCE[case.precision]
    return [f"{case.name}: {name} is off by {error:.1e}" for name, error in errors.items() if not error <= tolerance]


def frozen_faults(case: Case, folder: Path) -> list[str]:
    """Weights that changed in spite of `trainable`, and those with optimizer state that are not trained."""
    if case.frozen is None:
        return []
    trainable = [json.loads(value) for key, value in case.overrides.items() if key.endswith("trainable")]
    checkpoint = max((folder / "outputs" / case.name).glob("*/step-*"))
    moments = tensors_of(checkpoint, "optimizer")
    overrides = {**case.overrides}
    config = load_config(folder / f"{overrides.pop('toml', 'gpt_neox')}.toml", list(overrides.items()))
    model = build_model(unsplit_spec(config, 257))
    model.init_weights(config.job.seed)
    initial = dict(model.named_parameters())
    faults = []
    for name, weight in tensors_of(checkpoint).items():
        trained = [
            any(f"{name}.".startswith(f"{pattern.removesuffix('.new')}.") for pattern in patterns)
            for patterns in trainable
        ]
        if any(trained) == torch.equal(weight, initial[name]):
            faults.append(f"{case.name}: {name} has {'not ' if any(trained) else ''}changed")
        if "head.new" in trainable[-1] and name == "head.weight" and not torch.equal(weight[:257], initial[name][:257]):
            faults.append(f"{case.name}: old rows of the head have changed")
        if trained[-1] != any(moment.startswith(f"state.{name}.") for moment in moments):
            faults.append(f"{case.name}: {name}, trained in the last stage: {trained[-1]}, has other moments")
    return faults


def last_moments(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Adam's mean of the gradients, of every parameter, whole, from a run's last checkpoint."""
    checkpoint = max((folder / "outputs" / name).glob("*/step-*"))
    return {name: value for name, value in tensors_of(checkpoint, "optimizer").items() if name.endswith(".exp_avg")}
