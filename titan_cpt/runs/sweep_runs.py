"""The runs of a comparison: the arms of sweep files, and what several of them have in common and train once.

Stages that two arms begin with alike (the same recipe up to there, the same training data, the same settings that
round sums or pass over batches) are trained by the first of them. The others get its checkpoints, by links, under the
manifests that they have: an arm's result is that of the arm trained alone.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint import manifest
from titan_cpt.common.files import write_text_atomically
from titan_cpt.common.metrics_file import read_metrics
from titan_cpt.common.reading import matching
from titan_cpt.common.recipe import differences, fingerprint
from titan_cpt.common.run_folder import (
    METRICS_FILE,
    PLAN_FILE,
    PRE_ANNEAL,
    STAGE_END,
    checkpoint_folder,
    checkpoint_folders,
    locked,
)
from titan_cpt.config.load import check_config
from titan_cpt.config.overrides import set_key
from titan_cpt.config.schema import Config
from titan_cpt.config.sweep import point_names, points
from titan_cpt.config.toml_files import TomlFile, read_with_bases
from titan_cpt.data.inventory import take_inventory
from titan_cpt.data.mixture import leaves
from titan_cpt.errors import CheckpointError, ConfigError
from titan_cpt.planning.parallel import min_world_size
from titan_cpt.planning.plan import Plan
from titan_cpt.planning.plan_json import plan_as_json
from titan_cpt.planning.planner import make_plan

_KEPT = (STAGE_END, PRE_ANNEAL)
_COMPUTED_UNDER = ("training", "parallelism", "activation_checkpoint", "compile", "float8")
_WITHOUT_EFFECT = {"num_workers", "gc_freq"}  # of [training], on any number
_OF_VALIDATION = {"validation", "validation_format"}


@dataclass(frozen=True)
class SweepRun:
    """One run of a comparison: its config, and the plan on the fewest ranks of its layout."""

    name: str
    config: Config
    plan: Plan

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.job.output_dir) / self.config.job.name

    def checkpoint(self, index: int) -> Path:
        """Where the checkpoint of a stage's end lies."""
        stage = self.plan.stages[index]
        return checkpoint_folder(self.folder, stage.name, stage.steps)

    def is_done(self) -> bool:
        """Whether the last stage has come to its end under this recipe; its data is compared when it is trained on."""
        return _is_of(self.checkpoint(len(self.plan.stages) - 1), self.plan, len(self.plan.stages) - 1)


@dataclass(frozen=True)
class InvalidSweepRun:
    """A run that cannot be: its name, and what is wrong with it."""

    name: str
    fault: str


def read_sweep_runs(
    paths: Sequence[Path], overrides: Sequence[tuple[str, str]] = ()
) -> list[SweepRun | InvalidSweepRun]:
    """The arms of every file: of its [sweep], in `<output_dir>/<job.name>/<arm>`, or the file itself as one run.

    Raises:
        ConfigError: a file that cannot be read, none of whose arms can be, or two arms of one folder.
    """
    found: list[SweepRun | InvalidSweepRun] = []
    for path in paths:
        arms = [_arm(raw, path) for raw in _tables_of_arms(path, overrides)]
        broken = [arm for arm in arms if isinstance(arm, InvalidSweepRun)]
        if len(broken) == len(arms):
            raise ConfigError(broken[0].fault)
        found += arms
    folders = [arm.folder for arm in found if isinstance(arm, SweepRun)]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ConfigError(f"{folder}: two arms would be trained in this folder; give their files other job.names")
    return found


def without_sweep(paths: Sequence[Path]) -> Path | None:
    """The file, where there is one only and it has no [sweep], so that it is a single run."""
    return paths[0] if len(paths) == 1 and not read_with_bases(paths[0]).get("sweep") else None


def _tables_of_arms(path: Path, overrides: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    files: list[TomlFile] = []
    raw = read_with_bases(path, files=files)
    table = check_config(raw, path, overrides, files).sweep  # the overrides are in raw now, and the base is sound
    raw.pop("sweep", None)
    job = raw["job"]
    arms = []
    choices = points(table) if table else []
    for name, point in zip(point_names(choices), choices, strict=True):
        arm = copy.deepcopy(raw)
        faults = [fault for key, value in point.items() for fault in set_key(arm, key, copy.deepcopy(value))]
        if faults:
            raise ConfigError(f"{path}: {'; '.join(faults)}")
        arm["job"] |= {"name": name, "output_dir": str(Path(job.get("output_dir", "outputs")) / job["name"])}
        arms.append(arm)
    return arms or [raw]


def _arm(raw: dict[str, Any], path: Path) -> SweepRun | InvalidSweepRun:
    name = str(raw["job"]["name"])
    try:
        config = check_config(raw, path)
        return SweepRun(name, config, make_plan(config, take_inventory(config), min_world_size(config)))
    except ConfigError as error:  # a plan's faults too
        return InvalidSweepRun(name, str(error))


def shared_stages(arm: SweepRun, others: Sequence[SweepRun]) -> int:
    """How many of its first stages some other arm begins with too."""
    return max((_alike(arm, other) for other in others if other.folder != arm.folder), default=0)


def _alike(arm: SweepRun, other: SweepRun) -> int:
    if not _measured_alike(arm, other) or not _computed_alike(arm, other):
        return 0
    count = 0
    for index in range(min(len(arm.plan.stages), len(other.plan.stages))):
        if differences(arm.plan.recipe_until(index), other.plan.recipe_until(index)):
            break
        if _trained_on(arm, index) != _trained_on(other, index):
            break
        count = index + 1
    return count


def _measured_alike(arm: SweepRun, other: SweepRun) -> bool:
    """Whether what was measured on the way counts for the arm too: the same held-out windows, at the same steps."""
    ours, theirs = arm.config, other.config
    held_out = {name: table.validation for name, table in theirs.datasets.items() if table.validation}
    same = all(name in ours.datasets and ours.datasets[name].validation == files for name, files in held_out.items())
    return same and ours.validation == theirs.validation and ours.tokenizer.path == theirs.tokenizer.path


def _computed_alike(arm: SweepRun, other: SweepRun) -> bool:
    """Whether the same recipe gives both the same bits: rounding and skipped batches depend on more than the recipe."""
    ours, theirs = arm.config, other.config
    same = all(
        getattr(ours, table).model_dump(exclude=_WITHOUT_EFFECT)
        == getattr(theirs, table).model_dump(exclude=_WITHOUT_EFFECT)
        for table in _COMPUTED_UNDER
    )
    return same and ours.job.deterministic == theirs.job.deterministic


def _trained_on(arm: SweepRun, index: int) -> dict[str, Any]:
    """The tables of the datasets that a stage trains on, replay included, without what only validation reads."""
    names = {leaf.source.partition(".")[0] for leaf in leaves(arm.plan.stages[index].tree)}
    exclude: dict[str, Any] = dict.fromkeys(_OF_VALIDATION, True) | {"domains": {"__all__": _OF_VALIDATION}}
    return {name: arm.config.datasets[name].model_dump(exclude=exclude) for name in sorted(names)}


def adopt_shared_stages(arm: SweepRun, others: Sequence[SweepRun]) -> str:
    """Make the arm's folder begin where the furthest of the others has come on stages that are its own too.

    Says what was adopted, or nothing: the arm has checkpoints already, or nobody is ahead of it.

    Raises:
        CheckpointError: the checkpoint to adopt is damaged.
    """
    if checkpoint_folders(arm.folder):
        return ""
    best, count = None, 0
    for other in others:
        trained = 0
        for index in range(_alike(arm, other)):
            trained = index + 1 if _is_of(other.checkpoint(index), arm.plan, index) else trained
        if trained > count and other.folder != arm.folder:
            best, count = other, trained
    if best is None:
        return ""
    with locked(arm.folder, rank=0):
        write_text_atomically(arm.folder / PLAN_FILE, json.dumps(plan_as_json(arm.plan), indent=1))
        _write_past(best, arm, count)
        for index in range(count):  # the last one's end is planted last: an arm that was cut short here begins again
            for folder in _kept_points(best, arm.plan, index):
                record = manifest.verify(folder)
                manifest.link_checkpoint(folder, arm.folder / record["stage"] / folder.name, record)
    names = ", ".join(stage.name for stage in arm.plan.stages[:count])
    return f"{names} from {best.folder} (recipe {fingerprint(arm.plan.recipe_until(count - 1))})"


def _kept_points(donor: SweepRun, plan: Plan, index: int) -> list[Path]:
    folders = matching(donor.folder / plan.stages[index].name, "step-*")
    return [folder for folder in folders if _is_of(folder, plan, index, kinds=_KEPT)]


def _is_of(folder: Path, plan: Plan, index: int, *, kinds: Sequence[str] = (STAGE_END,)) -> bool:
    """Whether a checkpoint is there, of one of these kinds, written under the plan's recipe up to that stage."""
    try:
        record = manifest.read(folder)
    except CheckpointError:
        return False
    in_place = manifest.is_in_place(folder, record)
    return in_place and record["kind"] in kinds and not differences(record["recipe"], plan.recipe_until(index))


def _write_past(donor: SweepRun, arm: SweepRun, count: int) -> None:
    """metrics.jsonl of what was adopted, from which forgetting is computed."""
    stages = [stage.name for stage in arm.plan.stages[:count]]
    found = read_metrics(donor.folder, [stage.name for stage in donor.plan.stages])
    lines = [line for line in [*found.trains, *found.validations, *found.renewed] if line["stage"] in stages]
    told = {"kind": "event", "name": "adopt", "stages": stages, "folder": str(donor.folder)}
    write_text_atomically(arm.folder / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in [*lines, told]))
