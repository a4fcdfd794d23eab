"""Resuming a run: which checkpoint, whether it fits the config and the data, and at which stage training continues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from titan_cpt.checkpoint.manager import CheckpointManager, FoundCheckpoint
from titan_cpt.common.recipe import differences, fingerprint
from titan_cpt.common.run_folder import CONFIG_FILE
from titan_cpt.config.run_config import last_setting
from titan_cpt.data.mixture import leaves
from titan_cpt.distributed.process_group import ProcessInfo
from titan_cpt.errors import CheckpointError
from titan_cpt.planning.plan import Plan
from titan_cpt.training.forgetting import note_changed_validation
from titan_cpt.training.metrics import versions
from titan_cpt.training.saving import machine
from titan_cpt.training.state import TrainerState

_FILTER = "float8.filter_fqns"


def first_unfinished_stage(plan: Plan, found: FoundCheckpoint | None) -> tuple[int, FoundCheckpoint | None]:
    """The index of the stage that training continues with, and the checkpoint to resume it from.

    Returns:
        The number of stages if all are finished. The checkpoint is None where the stage begins.
    """
    if found is None:
        return 0, None
    index = int(found.manifest["stage_index"])
    finished = found.manifest["steps_done"] == plan.stages[index].steps
    if finished and not found.manifest.get("validation_due"):
        return index + 1, None
    return index, found


def log_start(state: TrainerState, found: FoundCheckpoint | None) -> None:
    """Log the start of this session: plan, data, versions; and validation sets that changed since the last one."""
    index = 0 if found is None else found.manifest["stage_index"]
    steps_done = 0 if found is None else found.manifest["steps_done"]
    note_changed_validation(state, state.plan.stages[index], steps_done)
    state.log.event(
        "start",
        fingerprint=state.plan.fingerprint,
        world_size=state.plan.world_size,
        data=state.identities,
        validation=state.validator.identities,
        versions=versions(state.process.device),
    )


def find_checkpoint(
    plan: Plan, checkpoints: CheckpointManager, identities: dict[str, str], console: Console
) -> FoundCheckpoint | None:
    """The newest checkpoint that is not damaged, if the config and the data that trained it are still the same.

    Returns:
        None if the run has no checkpoint.

    Raises:
        CheckpointError: the config or the data of what is already trained changed (each difference is named), or all
            checkpoints are damaged.
    """
    damaged: list[str] = []
    found = checkpoints.newest_valid(damaged.append)
    for message in damaged:
        console.print(f"skipping damaged checkpoint: {message}", highlight=False, markup=False)
    if found is None and damaged:
        raise CheckpointError(
            f"{checkpoints.run}: all of its checkpoints are damaged. The first: {damaged[0]}. "
            "Restore one; to train again from the beginning, remove that folder or choose another job.name"
        )
    if found is None:
        return None
    index = min(found.manifest["stage_index"], len(plan.stages) - 1)
    planned, recorded = plan.recipe_until(index), found.manifest["recipe"]
    if _FILTER not in recorded and "float8.recipe_name" in recorded:  # none configured, or written by an older version
        before = last_setting(checkpoints.run / CONFIG_FILE, *_FILTER.split("."))
        recorded = {**recorded, **({_FILTER: sorted({*before})} if before else {})}
    begun = {f"datasets.{leaf.source}.train" for stage in plan.stages[: index + 1] for leaf in leaves(stage.tree)}
    # Validation data changes no weight, so it may change: forgetting.py measures the baselines again.
    data = {key: value for key, value in found.manifest["data"].items() if key in begun or key == "tokenizer"}
    changed = differences(recorded, planned) + differences(data, {key: identities.get(key) for key in data})
    if changed:
        raise CheckpointError("\n  ".join([_what_differs(found, planned), *changed, _remedy(found, plan, changed)]))
    return found


def _what_differs(found: FoundCheckpoint, planned: dict[str, Any]) -> str:
    old, new = found.manifest["fingerprint"], fingerprint(planned)
    if old == new:
        return f"{found.folder}: was trained with other data than the config names now:"
    return f"{found.folder}: written under plan {old}, this config makes plan {new}:"


def _remedy(found: FoundCheckpoint, plan: Plan, changed: Sequence[str]) -> str:
    name = str(found.manifest["stage"])
    remedy = "Restore these, or begin a new run under another name (--job.name NAME)."
    if plan.stages[-1].name != name and found.manifest["stage_index"] < len(plan.stages) - 1:
        remedy += f" Stages after {name!r} may be changed freely."
    if all(line.startswith(f"stages.{name}.") for line in changed):
        remedy += f" To train {name!r} again, remove {found.folder.parent}."
    if any(line.startswith("model.vocab_size:") for line in changed):
        remedy += (
            " The vocabulary is padded to 128 x parallelism.tensor_parallel_degree: model.vocab_size = "
            f"{found.manifest['recipe']['model.vocab_size']} keeps it under any degree that divides it."
        )
    return remedy


def check_same_machine(found: FoundCheckpoint, process: ProcessInfo) -> None:
    """Refuse to resume where `job.deterministic` promises bits that another world size, torch or machine cannot give.

    Raises:
        CheckpointError: names each difference.
    """
    here = {**machine(process), "torch": torch.__version__}
    changed = differences({key: found.manifest.get(key) for key in here}, here)
    if changed:
        remedy = (
            "Restore these, or resume with --job.deterministic false: the batches stay the same, the last bits may not."
        )
        raise CheckpointError("\n  ".join([f"{found.folder}: job.deterministic cannot be kept:", *changed, remedy]))
