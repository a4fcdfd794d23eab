"""Resume a run: find its newest valid checkpoint, check that it fits config and data, find the stage to train next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from titan_cpt.checkpoint.manager import CheckpointManager, FoundCheckpoint
from titan_cpt.common.console import RunConsole, Verbosity
from titan_cpt.common.recipe import differences, fingerprint
from titan_cpt.common.run_folder import CONFIG_FILE
from titan_cpt.config.run_config import last_setting
from titan_cpt.config.used_plugins import used_plugins
from titan_cpt.data.mixture import leaves
from titan_cpt.distributed.process_group import ProcessInfo
from titan_cpt.errors import CheckpointError
from titan_cpt.planning.plan import Plan
from titan_cpt.training.changed_validation import note_changed_validation
from titan_cpt.training.metrics import versions
from titan_cpt.training.saving import machine
from titan_cpt.training.state import TrainerState

_FILTER = "float8.filter_fqns"


def first_unfinished_stage(plan: Plan, checkpoint: FoundCheckpoint | None) -> tuple[int, FoundCheckpoint | None]:
    """The index of the stage that training continues with, and the checkpoint to resume it from.

    Returns:
        The index is the number of stages if all are finished; the checkpoint is None if the stage has not begun.
    """
    if checkpoint is None:
        return 0, None
    index = int(checkpoint.manifest["stage_index"])
    finished = checkpoint.manifest["steps_done"] == plan.stages[index].steps
    if finished and not checkpoint.manifest.get("validation_due"):
        return index + 1, None
    return index, checkpoint


def log_start(state: TrainerState, checkpoint: FoundCheckpoint | None) -> None:
    """Log the start of this session: plan, data, versions; and validation sets that changed since the last one."""
    index = 0 if checkpoint is None else checkpoint.manifest["stage_index"]
    steps_done = 0 if checkpoint is None else checkpoint.manifest["steps_done"]
    note_changed_validation(state, state.plan.stages[index], steps_done)
    state.log.event(
        "start",
        fingerprint=state.plan.fingerprint,
        world_size=state.plan.world_size,
        data=state.identities,
        validation=state.validator.identities,
        versions=versions(state.process.device) if state.process.rank == 0 else {},  # asks git in a checkout
        **({"plugins": plugins} if (plugins := used_plugins(state.config)) else {}),
        **state.attention.chosen,
    )


def find_checkpoint(
    plan: Plan, checkpoints: CheckpointManager, identities: dict[str, str], console: RunConsole
) -> FoundCheckpoint | None:
    """The newest valid checkpoint, if the config and the data that it was trained with have not changed.

    Returns:
        None if the run has no checkpoint.

    Raises:
        CheckpointError: the config or the data of stages that have begun changed (the message lists each difference),
            or all checkpoints are damaged.
    """
    damaged: list[str] = []
    checkpoint = checkpoints.newest_valid(damaged.append)
    with console.level(Verbosity.QUIET):
        for message in damaged:
            console.print_line(f"skipping damaged checkpoint: {message}")
    if checkpoint is None and damaged:
        raise CheckpointError(
            f"{checkpoints.run}: all of its checkpoints are damaged. The first: {damaged[0]}. "
            "Restore one; to train again from the beginning, remove that folder or choose another job.name"
        )
    if checkpoint is None:
        return None
    index = min(checkpoint.manifest["stage_index"], len(plan.stages) - 1)
    planned = plan.recipe_until(index)
    recorded = _with_float8_filters(checkpoint.manifest["recipe"], checkpoints.run)
    trained_on = {f"datasets.{leaf.source}.train" for stage in plan.stages[: index + 1] for leaf in leaves(stage.tree)}
    # Validation data changes no weight, so it may change: changed_validation.py measures the baselines again.
    data = {key: value for key, value in checkpoint.manifest["data"].items() if key in trained_on or key == "tokenizer"}
    changed = _recipe_differences(recorded, planned) + differences(data, {key: identities.get(key) for key in data})
    if changed:
        headline = f"{checkpoint.folder}: {_headline(checkpoint.manifest, planned)}"
        raise CheckpointError("\n  ".join([headline, *changed, _remedy(checkpoint, plan, changed)]))
    return checkpoint


def misfit(run: Path, plan: Plan, manifest: Mapping[str, Any]) -> str | None:
    """How the recipe of a checkpoint that this run would resume from differs from the plan's; None if it does not."""
    planned = plan.recipe_until(min(manifest["stage_index"], len(plan.stages) - 1))
    changed = _recipe_differences(_with_float8_filters(manifest["recipe"], run), planned)
    return "\n  ".join([_headline(manifest, planned), *changed]) if changed else None


def _with_float8_filters(recipe: dict[str, Any], run: Path) -> dict[str, Any]:
    """A manifest's recipe with float8.filter_fqns, which older versions did not record, from the run's config.toml."""
    if _FILTER in recipe or "float8.recipe_name" not in recipe:
        return recipe
    filters = last_setting(run / CONFIG_FILE, *_FILTER.split("."))
    return {**recipe, _FILTER: sorted({*filters})} if filters else recipe


def _recipe_differences(recorded: Mapping[str, Any], planned: Mapping[str, Any]) -> list[str]:
    """The differences without the keys of stages that only one of the two has: the line `stages:` names these."""
    only_one = {*recorded.get("stages", ())} ^ {*planned.get("stages", ())}
    return [
        line
        for line in differences(recorded, planned)
        if not (line.startswith("stages.") and line.split(".", 2)[1] in only_one)
    ]


def _headline(manifest: Mapping[str, Any], planned: dict[str, Any]) -> str:
    old, new = manifest["fingerprint"], fingerprint(planned)
    if old == new:
        return "was trained with other data than the config names now:"
    return f"written under plan {old}, this config makes plan {new}:"


def _remedy(checkpoint: FoundCheckpoint, plan: Plan, changed: Sequence[str]) -> str:
    name = str(checkpoint.manifest["stage"])
    remedy = "Restore these, or begin a new run under another name (--job.name NAME)."
    index = checkpoint.manifest["stage_index"]
    if index < len(plan.stages) - 1 and plan.stages[index].name == name:
        last = plan.schedule_span(plan.stages[index])[-1]
        if last is not plan.stages[-1]:
            remedy += f" Stages after {last.name!r} may be changed freely."
    remedy += _remedy_of_continued_schedule(plan, changed)
    if all(line.startswith(f"stages.{name}.") for line in changed):
        remedy += f" To train {name!r} again, remove {checkpoint.folder.parent}."
    if any(line.startswith("model.vocab_size:") for line in changed):
        remedy += (
            " The vocabulary is padded to 128 x parallelism.tensor_parallel_degree: model.vocab_size = "
            f"{checkpoint.manifest['recipe']['model.vocab_size']} keeps it under any degree that divides it."
        )
    return remedy


def _remedy_of_continued_schedule(plan: Plan, changed: Sequence[str]) -> str:
    """Why stages that continue an LR schedule cannot be added, removed or changed in length after it was trained."""
    keys = [line.split(":")[0] for line in changed]
    for stage in plan.stages:
        where = f"stages.{stage.name}.lr."
        spanned = len(plan.schedule_span(stage)) > 1 or f"{where}span_steps" in keys
        if spanned and any(key.startswith(where) for key in keys):
            return (
                f" The LR schedule of {plan.schedule_span(stage)[0].name!r} spans the stages that continue it "
                '(lr = { schedule = "continue" }), and their number and length now change the LR of steps that are '
                "trained already. Give a new stage a schedule of its own, or plan the stages together in a new run. "
                "Stages can be added later to a constant schedule, and to an infinite or wsd schedule whose constant "
                "phase lasts to the end of the trained stage, with end points in steps or tokens."
            )
    return ""


def check_same_machine(checkpoint: FoundCheckpoint, process: ProcessInfo) -> None:
    """Check that machine, torch and number of ranks are those of the checkpoint, as `job.deterministic` requires.

    Raises:
        CheckpointError: they are not; the message lists each difference.
    """
    here = {**machine(process), "torch": torch.__version__}
    changed = differences({key: checkpoint.manifest.get(key) for key in here}, here)
    if changed:
        remedy = (
            "Restore these, or resume with --job.deterministic false: the batches stay the same, the last bits may not."
        )
        raise CheckpointError(
            "\n  ".join([f"{checkpoint.folder}: job.deterministic cannot be kept:", *changed, remedy])
        )
