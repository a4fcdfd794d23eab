"""Branches: the annealing of an infinite or wsd stage, begun at any checkpoint of its constant phase.

A branch is a run of its own. Its config is the old one up to the stage, which now ends after the annealing; its first
checkpoint is the old one, under a manifest with the branch's recipe. From there it is trained like any other run, and
its result is that of the branch's config trained from the start. The old run is only read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint import manifest
from titan_cpt.common.files import write_text_atomically
from titan_cpt.common.metrics_file import read_metrics
from titan_cpt.common.recipe import differences, fingerprint
from titan_cpt.common.run_folder import (
    CONFIG_FILE,
    METRICS_FILE,
    PRE_ANNEAL,
    checkpoint_folder,
    checkpoint_folders,
    locked,
)
from titan_cpt.config.load import check_config, load_config
from titan_cpt.config.run_config import require_own_run, write_run_config
from titan_cpt.config.schema import Config
from titan_cpt.data.inventory import take_inventory
from titan_cpt.errors import CheckpointError, PlanError
from titan_cpt.planning.plan import Plan
from titan_cpt.planning.planner import make_plan

_POINTS = ("warmup_until", "cooldown_until", "constant_until", "decay_from")
_ENDS_OF_CONSTANT = ("constant_until", "decay_from")


def branch_off(
    checkpoint: Path, *, tokens: int, min_lr: float | None, overrides: Sequence[tuple[str, str]], rank: int
) -> tuple[Config, bool]:
    """The config of the branch, and whether it is new: rank 0 makes its folder, unless a checkpoint is in it already.

    Args:
        checkpoint: a folder `<run>/<stage>/step-<8 digits>`.
        tokens: budget of the annealing, rounded up to whole steps.
        min_lr: LR of its last step; None for the stage's own.
        overrides: of the branch's config, by dotted key.

    Raises:
        CheckpointError: the checkpoint is damaged, the run's config is not what it was trained under, or the branch
            exists with other options.
        PlanError: the stage has no constant phase, or the checkpoint does not lie in it.
    """
    record = manifest.verify(checkpoint)
    run = checkpoint.resolve().parents[1]
    old = load_config(run / CONFIG_FILE)
    inventory = take_inventory(old)
    raw = _branch_tables(old, _checked_plan(checkpoint, record, make_plan(old, inventory)), record, tokens, min_lr)
    config = check_config(raw, run / CONFIG_FILE, overrides)
    plan = make_plan(config, inventory)
    folder = Path(config.job.output_dir) / config.job.name
    if os.path.realpath(folder) == str(run):
        raise PlanError(f"job.name: {config.job.name!r} is the run that is branched off; choose another name")
    trained = checkpoint_folders(folder)
    for existing in checkpoint_folders(folder, record["stage"])[:1]:
        _require_same_branch(existing, plan.recipe_until(record["stage_index"]))
    if rank == 0 and not trained:
        require_own_run(folder, config)
        with locked(folder, rank=0):
            write_run_config(folder / CONFIG_FILE, config)
            _write_past(run, folder, plan, record, checkpoint)
            recipe = plan.recipe_until(record["stage_index"])
            branched = {"recipe": recipe, "fingerprint": fingerprint(recipe), "branched_from": str(checkpoint)}
            planted = checkpoint_folder(folder, record["stage"], record["steps_done"])
            manifest.link_checkpoint(checkpoint, planted, {**record, **branched, "kind": PRE_ANNEAL})
    return config, not trained


def _require_same_branch(checkpoint: Path, recipe: Mapping[str, Any]) -> None:
    """Refuse to take a branch that exists for one of another length or learning rate."""
    if changed := differences(manifest.read(checkpoint)["recipe"], recipe):
        remedy = "Give the options of that branch, or another name to the new one (--job.name NAME)."
        raise CheckpointError("\n  ".join([f"{checkpoint}: this branch exists, and differs:", *changed, remedy]))


def _checked_plan(checkpoint: Path, record: dict[str, Any], plan: Plan) -> Plan:
    """The plan of the run's config, which must be the one that the checkpoint was written under."""
    index = record["stage_index"]
    if index >= len(plan.stages) or plan.stages[index].name != record["stage"]:
        raise CheckpointError(f"{checkpoint}: is of stage {record['stage']!r}, which the run's config.toml has no more")
    changed = differences(record["recipe"], plan.recipe_until(index))
    if changed:
        raise CheckpointError("\n  ".join([f"{checkpoint}: the run's config.toml has changed since:", *changed]))
    return plan


def _branch_tables(
    config: Config, plan: Plan, record: dict[str, Any], tokens: int, min_lr: float | None
) -> dict[str, Any]:
    """The old config's tables: the stage's steps and schedule are those of the branch, and no stage follows it."""
    done, name, number = int(record["steps_done"]), record["stage"], record["stage_index"]
    recipe = plan.stages[number].recipe
    points = {key: Fraction(recipe[f"lr.{key}"]) for key in _POINTS if f"lr.{key}" in recipe}
    ends = [key for key in _ENDS_OF_CONSTANT if key in points]
    if not ends:
        raise PlanError(f"stages.{name}: schedule {recipe['lr.schedule']!r} has no constant phase to anneal from")
    first, last = points.get("cooldown_until", points["warmup_until"]), points[ends[0]]
    if not first <= done <= last:
        raise PlanError(
            f"stages.{name}: {done} steps are done in this checkpoint, and the constant phase lasts from step "
            f"{float(first):g} to step {float(last):g}; anneal from a checkpoint inside it"
        )
    raw: dict[str, Any] = config.model_dump(mode="json", by_alias=True, exclude_none=True)
    raw["job"]["name"] = f"{config.job.name}-anneal-{name}-{done}"
    raw["stages"] = raw["stages"][: number + 1]
    stage = raw["stages"][number]
    stage.pop("tokens", None)
    stage["steps"] = done + math.ceil(Fraction(tokens, plan.step_tokens))
    stage["lr"] |= {key: _in_steps(stage["lr"][key], point) for key, point in points.items()} | {ends[0]: done}
    stage["lr"]["min"] = recipe["lr.min"] if min_lr is None else min_lr
    return raw


def _in_steps(written: Any, point: Fraction) -> Any:
    """An end point that stays where it is though the stage gets another length: a share of it turns into steps."""
    if not isinstance(written, float):
        return written
    if point.denominator == 1:
        return int(point)
    places = next(n for n in range(1, 1100) if (point * 10**n).denominator == 1)  # a decimal times an integer ends
    digits = str(int(point * 10**places)).rjust(places + 1, "0")
    return f"{digits[:-places]}.{digits[-places:]} steps"


def _write_past(run: Path, folder: Path, plan: Plan, record: dict[str, Any], checkpoint: Path) -> None:
    """metrics.jsonl of the branch: what was measured on the way to it, from which forgetting is computed."""
    name, done = record["stage"], record["steps_done"]
    earlier = {stage.name for stage in plan.stages[: record["stage_index"]]}
    told = {"kind": "event", "name": "branch", "stage": name, "step": done, "folder": str(checkpoint)}
    found = read_metrics(run, [stage.name for stage in plan.stages])
    lines = [
        line
        for line in [*found.trains, *found.validations, *found.renewed]
        if line["stage"] in earlier or (line["stage"] == name and line["step"] <= done)
    ]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, told])
    write_text_atomically(folder / METRICS_FILE, text)
