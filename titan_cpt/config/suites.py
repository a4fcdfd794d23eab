"""Suites of benchmarks: which tasks of lm-evaluation-harness, with how many worked examples, judged by which metric.

docs/evaluation.md says where each task comes from and what cannot be compared with the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from titan_cpt.errors import ConfigError


@dataclass(frozen=True)
class Task:
    """One task as a suite asks it.

    Attributes:
        name: in the harness, or in a folder of tasks given with --tasks-dir.
        shots: worked examples before each question; None for the task's own number.
        metric: what counts; None for the task's first one.
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
    # Of the files that scripts/fetch_benchmarks.py brings; nothing is asked of a hub.
    "minimal_pairs": tuple(Task(f"{name}_local", 0, "acc") for name in ("clams_de", "clams_en", "blimp_en")),
    "offline": (
        *(Task(f"{name}_local", 0, "acc") for name in ("clams_de", "clams_en", "blimp_en", "arc_easy", "sciq", "copa")),
        Task("hellaswag_local", 0, "acc_norm"),
        *(Task(f"{name}_local", 0, "acc") for name in ("arc_challenge", "piqa", "winogrande", "openbookqa")),
    ),
}
"""By name. A suite's average is the plain mean of its tasks' metrics."""


FETCHED = frozenset(task.name for name in ("minimal_pairs", "offline") for task in SUITES[name])
"""Tasks whose questions scripts/fetch_benchmarks.py downloads once."""
HOW_TO_FETCH = "run `scripts/fetch_benchmarks.py data/bench` where there is a network"


def require_folder(tasks: Sequence[Task], folder: Path | None) -> None:
    """Find out in no time whether tasks that have to be fetched were fetched at all.

    Args:
        folder: of tasks beside the harness's own.

    Raises:
        ConfigError: it is not named, or not there.
    """
    fetched = [task.name for task in tasks if task.name in FETCHED]
    if folder is None and fetched:
        raise ConfigError(
            f"{', '.join(fetched)}: their questions are files: {HOW_TO_FETCH}, then add --tasks-dir data/bench/tasks "
            "(in a config: evaluation.tasks_dir)"
        )
    if folder is not None and not folder.is_dir():
        advice = f"; {HOW_TO_FETCH}, which makes data/bench/tasks" if fetched else ""
        raise ConfigError(f"{folder}: no such folder of tasks{advice}")


def suite_of(name: str) -> tuple[Task, ...]:
    """The tasks of a suite.

    Raises:
        ConfigError: there is no suite of this name.
    """
    if name not in SUITES:
        raise ConfigError(f"no suite is called {name!r}; there are {', '.join(SUITES)}")
    return SUITES[name]


def chosen_tasks(suite: str | None, names: Sequence[str]) -> tuple[Task, ...]:
    """What a command line asks for: a suite, some of its tasks, or tasks by themselves.

    Args:
        names: TASK, TASK:SHOTS or TASK:SHOTS:METRIC; beside a suite the bare names of tasks of it.

    Raises:
        ConfigError: a name is not of the suite, or not of this form; or nothing was asked for.
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


"""Prompts whose continuations are shown beside each other, stage after stage: five German, four English."""
