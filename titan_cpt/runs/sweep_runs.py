"""The runs of a sweep: from sweep files to one config, plan and run folder for each combination of values."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint import manifest
from titan_cpt.common.recipe import differences
from titan_cpt.common.run_folder import STAGE_END, checkpoint_folder
from titan_cpt.config.load import check_config, load_config
from titan_cpt.config.overrides import set_key
from titan_cpt.config.schema import Config
from titan_cpt.config.sweep import FIT, SweepFitConfig, point_names, points
from titan_cpt.config.toml_files import TomlFile, read_with_bases
from titan_cpt.data.inventory import take_inventory
from titan_cpt.errors import CheckpointError, ConfigError
from titan_cpt.planning.parallel import min_world_size
from titan_cpt.planning.plan import Plan
from titan_cpt.planning.planner import make_plan
from titan_cpt.tracking.trackers import TRACKERS


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        name: named by the swept values, such as `fraction-0.05_seed-1`.
        plan: the plan for the smallest world size that the config's parallelism degrees allow.
    """

    name: str
    config: Config
    plan: Plan

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.job.output_dir) / self.config.job.name

    def checkpoint(self, stage_index: int) -> Path:
        """The folder of the checkpoint at the end of a stage."""
        stage = self.plan.stages[stage_index]
        return checkpoint_folder(self.folder, stage.name, stage.steps)

    def is_done(self) -> bool:
        """Whether the checkpoint at the end of the last stage exists and was trained under this recipe.

        Does not compare the training data; training does.
        """
        last = len(self.plan.stages) - 1
        return has_checkpoint(self.checkpoint(last), self.plan, last)


@dataclass(frozen=True)
class InvalidSweepRun:
    """A run of a sweep whose config or plan is invalid: its name and the error message."""

    name: str
    problem: str


def read_sweep_runs(
    paths: Sequence[Path], overrides: Sequence[tuple[str, str]] = ()
) -> list[SweepRun | InvalidSweepRun]:
    """The runs of every file, in order: one for each combination of [sweep], or the file itself as a single run.

    The folder of a sweep run is `<output_dir>/<job.name>/<name of the sweep run>`.

    Raises:
        ConfigError: a file cannot be read, all runs of a file are invalid, or two runs have the same folder.
    """
    found: list[SweepRun | InvalidSweepRun] = []
    for path in paths:
        runs = [_sweep_run(raw, path) for raw in _tables_of_runs(path, overrides)]
        invalid = [run for run in runs if isinstance(run, InvalidSweepRun)]
        if len(invalid) == len(runs):
            raise ConfigError(invalid[0].problem)
        found += runs
    folders = [run.folder for run in found if isinstance(run, SweepRun)]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ConfigError(f"{folder}: two sweep runs have this folder; change job.name in one of their files")
    return found


def single_run_file(paths: Sequence[Path]) -> Path | None:
    """The file, if there is only one and it has no [sweep] table; None otherwise."""
    return paths[0] if len(paths) == 1 and not read_with_bases(paths[0]).get("sweep") else None


def fit_settings(path: Path, overrides: Sequence[tuple[str, str]] = ()) -> SweepFitConfig | None:
    """The [sweep.fit] of a file; None without it.

    Raises:
        ConfigError: the file is invalid.
    """
    table = load_config(path, overrides).sweep.get(FIT)
    return None if table is None else SweepFitConfig.model_validate(table)


def has_checkpoint(folder: Path, plan: Plan, stage_index: int, *, kinds: Sequence[str] = (STAGE_END,)) -> bool:
    """Whether the folder holds a checkpoint of one of these kinds, trained under the plan's recipe up to that stage."""
    try:
        record = manifest.read(folder)
    except CheckpointError:
        return False
    in_place = manifest.is_in_place(folder, record)
    return in_place and record["kind"] in kinds and not differences(record["recipe"], plan.recipe_until(stage_index))


def _tables_of_runs(path: Path, overrides: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """The TOML tables of every run of a file, with the overrides applied."""
    files: list[TomlFile] = []
    raw = read_with_bases(path, files=files)
    table = check_config(raw, path, overrides, files).sweep  # also puts the overrides into raw, and checks the base
    raw.pop("sweep", None)
    job = raw["job"]
    tables = []
    choices = points(table) if table else []
    for name, point in zip(point_names(choices), choices, strict=True):
        run = copy.deepcopy(raw)
        problems = [text for key, value in point.items() for text in set_key(run, key, copy.deepcopy(value))]
        if problems:
            raise ConfigError(f"{path}: {'; '.join(problems)}")
        for tracker in TRACKERS:
            if isinstance(table := run.get("metrics", {}).get(tracker), dict):
                table.setdefault("group", job["name"])
        run["job"] |= {"name": name, "output_dir": str(Path(job.get("output_dir", "outputs")) / job["name"])}
        tables.append(run)
    return tables or [raw]


def _sweep_run(raw: dict[str, Any], path: Path) -> SweepRun | InvalidSweepRun:
    name = str(raw["job"]["name"])
    try:
        config = check_config(raw, path)
        return SweepRun(name, config, make_plan(config, take_inventory(config), min_world_size(config)))
    except ConfigError as error:  # includes PlanError
        return InvalidSweepRun(name, str(error))
