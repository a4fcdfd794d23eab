"""Every layout gives the numbers of one process: three steps of the real trainer from one seed on real batches."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity_launch import launch, record
from parity_layouts import CASES, HANDED_ON, REFERENCES, Case

WORLD_SIZES = sorted({case.world_size for case in CASES})
TOLERANCE = {False: 1e-5, True: 2e-3}  # by bf16; nats per token for losses, relative for gradient norms


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs of this module lie, those of one process among them."""
    folder = tmp_path_factory.mktemp("parity")
    runs = [{"job.name": name, **overrides} for name, overrides in REFERENCES.items()]
    launch(folder, [*runs, {"job.name": "one-two-stages", "toml": "two-stages"}], 1)
    return folder


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_layout_gives_the_numbers_of_one_process(world_size: int, folder: Path) -> None:
    """Losses, gradient norms, validation and the hashes of the global batches, over all layouts of a world size."""
    cases = [case for case in CASES if case.world_size == world_size]
    launch_all(folder, world_size)

    faults = [fault for case in cases for fault in faults_of(case, folder)]
    assert not faults, "\n".join(faults)


def test_every_layout_reads_the_checkpoint_of_any_other(folder: Path) -> None:
    """A second stage with the optimizer kept, under another layout than the first, goes on as one process would."""
    launch_all(folder, 4)
    launch(folder, [{"job.name": "handed-to-one", "toml": "two-stages"}], 1)

    names = [*(f"handed-{number}" for number in range(len(HANDED_ON))), "handed-to-one"]
    cases = [Case(name, 4, against="one-two-stages") for name in names]
    faults = [fault for case in cases for fault in faults_of(case, folder)]
    assert not faults, "\n".join(faults)


def launch_all(folder: Path, world_size: int) -> None:
    """Every run of so many ranks in one launch, unless it was done already; the runs that hand on are of four ranks."""
    if world_size > 1 and (folder / f"output-{world_size}.txt").exists():
        return
    runs = [{"job.name": case.name, **case.overrides} for case in CASES if case.world_size == world_size]
    for number, (saves, reads) in enumerate(HANDED_ON if world_size == 4 else ()):
        runs += [{"job.name": f"handed-{number}", **saves.overrides}]
        runs += [{"job.name": f"handed-{number}", "toml": "two-stages", **reads.overrides}]
    runs += [{"job.name": "handed-to-one", **HANDED_ON[1][0].overrides}] if world_size == 4 else []
    launch(folder, runs, world_size)


def faults_of(case: Case, folder: Path) -> list[str]:
    """Where a case's numbers are not those of one process."""
    tolerance = TOLERANCE[case.bf16]
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
    return faults
