"""Benchmark suites: tasks of lm-evaluation-harness, with their number of few-shot examples and their metric.

docs/evaluation.md has the source of each task, and what cannot be compared with the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from titan_cpt.common.text import did_you_mean
from titan_cpt.errors import ConfigError


@dataclass(frozen=True)
class Task:
    """A benchmark task with its settings.

    Attributes:
        name: the task's name in lm-evaluation-harness, or in the folder given with --tasks-dir.
        shots: few-shot examples before each question; None: as the task defines it.
        metric: the reported metric; None: the first one of the task.
    """

    name: str
    shots: int | None = None
    metric: str | None = None


_ACC = ("winogrande", "piqa", "openbookqa", "arc_easy", "arc_challenge", "boolq", "mathqa")

SUITES: dict[str, tuple[Task, ...]] = {
    # Ibrahim et al. 2024, arXiv:2403.08763, English.
    "paper_english": (
        Task("hellaswag", 0, "acc_norm"),
        *(Task(name, 0, "acc") for name in (*_ACC, "truthfulqa_mc1", "truthfulqa_mc2")),
        Task("nq_open", 5, "exact_match"),
        Task("triviaqa", 5, "exact_match"),
        Task("mmlu", 5, "acc"),
    ),
    "paper_german": (Task("hellaswag_de", 0, "acc_norm"), Task("arc_de", 0, "acc"), Task("m_mmlu_de", 5, "acc")),
    # Local files that scripts/fetch_benchmarks.py makes; no hub is needed.
    "in_context": tuple(Task(f"{name}_local", 0, "acc") for name in ("copying", "recall")),
    "minimal_pairs": tuple(Task(f"{name}_local", 0, "acc") for name in ("clams_de", "clams_en", "blimp_en")),
    "offline": (
        *(Task(f"{name}_local", 0, "acc") for name in ("clams_de", "clams_en", "blimp_en", "arc_easy", "sciq", "copa")),
        Task("hellaswag_local", 0, "acc_norm"),
        *(Task(f"{name}_local", 0, "acc") for name in ("arc_challenge", "piqa", "winogrande", "openbookqa")),
    ),
}
"""{name: tasks}. The average of a suite is the unweighted mean of its tasks' metrics."""


FETCHED = frozenset(task.name for name in ("in_context", "minimal_pairs", "offline") for task in SUITES[name])
"""Tasks whose data scripts/fetch_benchmarks.py downloads or makes once."""
HOW_TO_FETCH = "run `scripts/fetch_benchmarks.py data/bench` on a machine with network access"


def require_folder(tasks: Sequence[Task], folder: Path | None) -> None:
    """Check, without loading the harness, that the folder of additional tasks exists if the tasks need it.

    Args:
        folder: the folder of additional tasks; None if none is given.

    Raises:
        ConfigError: a task needs the folder and none is given, or the folder does not exist.
    """
    fetched = [task.name for task in tasks if task.name in FETCHED]
    if folder is None and fetched:
        raise ConfigError(
            f"{', '.join(fetched)}: need downloaded files: {HOW_TO_FETCH}, then add --tasks-dir data/bench/tasks "
            "(in a config: evaluation.tasks_dir)"
        )
    if folder is not None and not folder.is_dir():
        advice = f"; {HOW_TO_FETCH}, which makes data/bench/tasks" if fetched else ""
        raise ConfigError(f"{folder}: there is no such folder of tasks{advice}")


def suite_of(name: str) -> tuple[Task, ...]:
    """The tasks of a suite.

    Raises:
        ConfigError: there is no suite of this name.
    """
    if name not in SUITES:
        raise ConfigError(f"unknown suite {name!r}{did_you_mean(name, SUITES)}; allowed are {', '.join(SUITES)}")
    return SUITES[name]


def chosen_tasks(suite: str | None, names: Sequence[str]) -> tuple[Task, ...]:
    """The tasks that a command line selects: a suite, some tasks of a suite, or tasks without a suite.

    Args:
        names: TASK, TASK:SHOTS or TASK:SHOTS:METRIC; together with a suite only TASK.

    Raises:
        ConfigError: a task is not in the suite or does not have this form; or neither suite nor tasks are given.
    """
    if suite is None:
        if not names:
            raise ConfigError(f"command line: give --suite ({', '.join(SUITES)}) or --tasks TASK[:SHOTS[:METRIC]]...")
        return tuple(_task(name) for name in names)
    tasks = suite_of(suite)
    foreign = sorted(set(names) - {task.name for task in tasks})
    if foreign:
        raise ConfigError(
            f"command line: {', '.join(foreign)}: not in suite {suite}, which has {', '.join(t.name for t in tasks)}"
        )
    return tuple(task for task in tasks if not names or task.name in names)


def _task(text: str) -> Task:
    name, _, rest = text.partition(":")
    shots, _, metric = rest.partition(":")
    if not name or (shots and not shots.isdecimal()):
        raise ConfigError(f"command line: --tasks takes TASK, TASK:SHOTS or TASK:SHOTS:METRIC, got {text!r}")
    return Task(name, int(shots) if shots else None, metric or None)
