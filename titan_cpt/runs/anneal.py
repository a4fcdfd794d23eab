"""Branches: anneal an infinite or wsd stage from any checkpoint of its constant phase, in a run of its own.

The branch's config is the old run's config up to that stage, which now ends with the annealing. Its first checkpoint
is the old one, linked, with the branch's recipe in the manifest. It is then trained like any other run, with the same
result as if its config had been trained from the start. The old run is not changed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint import manifest
from titan_cpt.common.recipe import differences, fingerprint
from titan_cpt.common.run_folder import CONFIG_FILE, PRE_ANNEAL, checkpoint_folder, checkpoint_folders, locked
from titan_cpt.config.load import check_config, load_config
from titan_cpt.config.run_config import require_own_run, write_run_config
from titan_cpt.config.schema import Config
from titan_cpt.data.inventory import take_inventory
from titan_cpt.errors import CheckpointError, PlanError
from titan_cpt.planning.plan import Plan
from titan_cpt.planning.planner import make_plan
from titan_cpt.runs.inherited_metrics import copy_metrics

_END_POINTS = ("warmup_until", "cooldown_until", "constant_until", "decay_from")
_ENDS_OF_CONSTANT_PHASE = ("constant_until", "decay_from")


def branch_off(
    checkpoint: Path, *, tokens: int, min_lr: float | None, overrides: Sequence[tuple[str, str]], writes: bool
) -> tuple[Config, bool]:
    """Make the run folder of a branch, unless it has checkpoints; returns its config and whether it is new.

    Args:
        checkpoint: a folder `<run>/<stage>/step-<8 digits>`.
        tokens: length of the annealing, rounded up to whole steps.
        min_lr: LR of its last step; None for the stage's own.
        overrides: dotted keys and values that change the branch's config.
        writes: this process makes the folder: rank 0, unless it is a dry run.

    Raises:
        CheckpointError: the checkpoint is damaged, the run's config is not the one that it was trained with, or the
            branch exists with other options.
        PlanError: the stage has no constant phase, or the checkpoint is outside it.
    """
    record = manifest.verify(checkpoint)
    run = checkpoint.resolve().parents[1]
    run_config = load_config(run / CONFIG_FILE)
    inventory = take_inventory(run_config)
    run_plan = make_plan(run_config, inventory)
    _require_same_recipe(checkpoint, record, run_plan)
    tables = _branch_tables(run_config, run_plan, record, tokens, min_lr)
    config = check_config(tables, run / CONFIG_FILE, overrides)
    plan = make_plan(config, inventory)
    folder = Path(config.job.output_dir) / config.job.name
    if os.path.realpath(folder) == str(run):
        raise PlanError(f"job.name: {config.job.name!r} is the run that is branched off; choose another name")
    is_new = not checkpoint_folders(folder)
    for existing in checkpoint_folders(folder, record["stage"])[:1]:
        _require_same_branch(existing, plan.recipe_until(record["stage_index"]))
    if writes and is_new:
        require_own_run(folder, config)
        with locked(folder, rank=0):
            write_run_config(folder / CONFIG_FILE, config)
            _copy_metrics_until(checkpoint, record, plan, run, folder)
            _link_branch_point(checkpoint, record, plan, folder)
    return config, is_new


def _copy_metrics_until(checkpoint: Path, record: Mapping[str, Any], plan: Plan, run: Path, folder: Path) -> None:
    stage = record["stage"]
    steps_done = record["steps_done"]
    copy_metrics(
        run,
        folder,
        stages=[each.name for each in plan.stages],
        until={**dict.fromkeys(each.name for each in plan.stages[: record["stage_index"]]), stage: steps_done},
        event={"name": "branch", "stage": stage, "step": steps_done, "folder": str(checkpoint)},
    )


def _link_branch_point(checkpoint: Path, record: Mapping[str, Any], plan: Plan, folder: Path) -> None:
    """Make the branch's first checkpoint: links to the old files, and a manifest with the branch's recipe."""
    recipe = plan.recipe_until(record["stage_index"])
    changed = {"recipe": recipe, "fingerprint": fingerprint(recipe), "branched_from": str(checkpoint)}
    target = checkpoint_folder(folder, record["stage"], record["steps_done"])
    manifest.link_checkpoint(checkpoint, target, {**record, **changed, "kind": PRE_ANNEAL})


def _require_same_branch(checkpoint: Path, recipe: Mapping[str, Any]) -> None:
    """Raise CheckpointError if the branch exists with another length or learning rate."""
    if changed := differences(manifest.read(checkpoint)["recipe"], recipe):
        remedy = "Give the options of that branch, or another name to the new one (--job.name NAME)."
        raise CheckpointError("\n  ".join([f"{checkpoint}: this branch exists with other options:", *changed, remedy]))


def _require_same_recipe(checkpoint: Path, record: Mapping[str, Any], plan: Plan) -> None:
    """Raise CheckpointError if the run's config is not the one that the checkpoint was trained with."""
    index = record["stage_index"]
    if index >= len(plan.stages) or plan.stages[index].name != record["stage"]:
        raise CheckpointError(
            f"{checkpoint}: is of stage {record['stage']!r}, which the run's {CONFIG_FILE} no longer has"
        )
    changed = differences(record["recipe"], plan.recipe_until(index))
    if changed:
        title = f"{checkpoint}: the run's {CONFIG_FILE} has changed since this checkpoint was saved:"
        raise CheckpointError("\n  ".join([title, *changed]))


def _branch_tables(
    config: Config, plan: Plan, record: Mapping[str, Any], tokens: int, min_lr: float | None
) -> dict[str, Any]:
    """The branch's TOML tables: the old config up to the stage, whose steps and schedule end with the annealing."""
    done = int(record["steps_done"])
    name = record["stage"]
    number = record["stage_index"]
    before = plan.stages[number].schedule_offset
    first_stage = plan.schedule_span(plan.stages[number])[0]  # it has the schedule, which this stage may continue
    recipe = first_stage.recipe
    points = {key: Fraction(recipe[f"lr.{key}"]) for key in _END_POINTS if f"lr.{key}" in recipe}
    ends = [key for key in _ENDS_OF_CONSTANT_PHASE if key in points]
    if not ends:
        raise PlanError(
            f"stages.{name}: schedule {recipe['lr.schedule']!r} has no constant phase to anneal from: name a "
            "checkpoint of a stage with an infinite or WSD schedule"
        )
    first = points.get("cooldown_until", points["warmup_until"])
    last = points[ends[0]]
    if not first <= before + done <= last:
        raise PlanError(
            f"stages.{name}: this checkpoint is at step {done}, and the constant phase lasts from step "
            f"{float(first - before):g} to step {float(last - before):g}; anneal from a checkpoint inside it"
        )
    raw: dict[str, Any] = config.model_dump(mode="json", by_alias=True, exclude_none=True)
    raw["job"]["name"] = f"{config.job.name}-anneal-{name}-{done}"
    raw["stages"] = raw["stages"][: number + 1]
    stage = raw["stages"][number]
    stage.pop("tokens", None)
    planned = plan.stages[number]
    annealed = planned.batch_sizes.sequences_before(done) + Fraction(tokens, planned.seq_len)
    stage["steps"] = math.ceil(planned.batch_sizes.step_at(annealed))
    if planned.warm_up_passes > stage["steps"]:
        stage["optimizer_state"] = f"warm:{stage['steps']}"  # it is past, and a plan refuses more passes than steps
    lr = raw["stages"][plan.stages.index(first_stage)]["lr"]
    lr |= {key: _in_steps(lr[key], point) for key, point in points.items()} | {ends[0]: before + done}
    lr["min"] = recipe["lr.min"] if min_lr is None else min_lr
    return raw


def _in_steps(written: Any, point: Fraction) -> Any:
    """The end point of a stage whose length changes: a share of the old length becomes the same number of steps."""
    if not isinstance(written, float):
        return written
    if point.denominator == 1:
        return int(point)
    decimals = next(n for n in range(1, 1100) if (point * 10**n).denominator == 1)  # a decimal times an integer ends
    digits = str(int(point * 10**decimals)).rjust(decimals + 1, "0")
    return f"{digits[:-decimals]}.{digits[-decimals:]} steps"
