"""What the runs of a sweep measured in one stage: shares of the datasets, tokens, learning rates and losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from titan_cpt.errors import DataError, TitanError
from titan_cpt.planning.plan import Plan, StageCheckpoint, StagePlan
from titan_cpt.reporting.comparison import compare, incomparable_datasets
from titan_cpt.reporting.run_log import RunLog, read_run
from titan_cpt.reporting.summary import summarize_log
from titan_cpt.runs.laws.fitting import Array
from titan_cpt.runs.sweep_runs import InvalidSweepRun, SweepRun


@dataclass(frozen=True)
class MeasuredRun:
    """A stage of one run, trained to its end. Losses in nats per token.

    Attributes:
        before: loss of each dataset before the stage.
        end: loss of each dataset at the end of the stage; the mean over the final window where there is one.
        curve: (steps done, losses) of each validation of the stage after its beginning.
    """

    name: str
    plan: Plan
    stage: StagePlan
    before: Mapping[str, float]
    end: Mapping[str, float]
    curve: Sequence[tuple[int, Mapping[str, float]]]

    def share(self, dataset: str) -> float:
        """Share of a dataset, replay included, in the stage's sequences."""
        return float(self.stage.shares.get(dataset.partition("@")[0].partition(".")[0], 0))

    @cached_property
    def lrs(self) -> Array:
        """The learning rate of each step of the stage."""
        return np.array([self.stage.lr_at(step) for step in range(self.stage.steps)], dtype=np.float64)

    @cached_property
    def area_before(self) -> float | None:
        """The sum of the learning rates of all steps before the stage; None if another run trained some of them."""
        total = 0.0
        init = self.stage.init
        while isinstance(init, StageCheckpoint):
            if init.average:
                return None
            parent = self.plan.by_name[init.stage]
            total += sum(parent.lr_at(step) for step in range(init.steps_done))
            init = parent.init
        return total if init == "random" else None


def measured_runs(
    runs: Sequence[SweepRun | InvalidSweepRun], stage: str | None, omitted: Callable[[str], None]
) -> list[MeasuredRun]:
    """The runs whose stage is trained to its end and validated there.

    Args:
        stage: name of the stage; None for the last one.
        omitted: called with a sentence for each run that is omitted.

    Raises:
        DataError: no run has the stage, or runs were validated on different data.
    """
    found, logs = [], []
    for run in runs:
        if isinstance(run, InvalidSweepRun):
            omitted(f"{run.name}: invalid, not fitted")
            continue
        name = stage or run.plan.stages[-1].name
        if name not in run.plan.by_name:
            known = ", ".join(run.plan.by_name)
            raise DataError(f"sweep.fit.stage: {run.name} has no stage {name!r}; there are {known}")
        try:
            log = read_run(run.folder)
        except TitanError:
            omitted(f"{run.name}: not trained yet, not fitted")
            continue
        measured = _measured(run, log, run.plan.by_name[name])
        if measured is None:
            omitted(f"{run.name}: stage {name} is not trained to its end, not fitted")
            continue
        found.append(measured)
        logs.append(log)
    if different := incomparable_datasets(compare(logs)):
        raise DataError(
            f"the losses of {', '.join(different)} were measured on different validation data or windows in these "
            "runs: a law cannot be fitted to them; train the runs again on one validation set"
        )
    return found


def _measured(run: SweepRun, log: RunLog, stage: StagePlan) -> MeasuredRun | None:
    summary = next((each for each in summarize_log(log)["stages"] if each["name"] == stage.name), None)
    if summary is None or summary["measured_at"] != stage.steps:
        return None
    by_step: dict[int, dict[str, float]] = {}
    for line in log.validations:
        if line["stage"] == stage.name and line["step"] > 0 and line["loss_nats_per_token"] is not None:
            by_step.setdefault(line["step"], {})[line["dataset"]] = line["loss_nats_per_token"]
    return MeasuredRun(
        name=run.name,
        plan=run.plan,
        stage=stage,
        before=summary["before"],
        end={**summary["after"], **summary["final_loss"]},
        curve=sorted(by_step.items()),
    )
