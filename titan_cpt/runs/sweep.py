"""Train the runs of a sweep one after another, or one of them as a task of a Slurm array.

Each run is trained by the ordinary `titan-cpt train` in a process of its own. Finished runs are skipped; a run that
fails does not stop the others. Stages that several runs share are trained once (see shared_stages.py).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from titan_cpt.common.exit_status import FAILURE, STOPPED_EARLY, SUCCESS
from titan_cpt.common.files import make_folder
from titan_cpt.common.run_folder import SWEEP_CONFIG_FILE
from titan_cpt.config.run_config import require_own_run, write_run_config
from titan_cpt.errors import ConfigError, TitanError
from titan_cpt.runs.shared_stages import SharedStageLock, adopt_shared_stages
from titan_cpt.runs.sweep_runs import InvalidSweepRun, SweepRun, read_sweep_runs, single_run_file
from titan_cpt.runs.training_process import StopRequested, StopSignals, last_error, train_in_process

CONSOLE_NAME = "console.txt"
TRAIN = (sys.executable, "-m", "titan_cpt", "train")


@dataclass(frozen=True)
class Outcome:
    """How a sweep run ended.

    Attributes:
        state: done, skipped (it was done before), ready (prepared, not trained), stopped, failed or not run.
        folder: the run folder; None if there is none.
        message: the error message of a failed run.
    """

    name: str
    state: str
    folder: Path | None
    message: str = ""


def train_sweep_runs(
    paths: Sequence[Path],
    overrides: Sequence[tuple[str, str]],
    *,
    only: int | None = None,
    launch: Sequence[str] = TRAIN,
    train: bool = True,
    log: Callable[[str], None] = print,
) -> list[Outcome]:
    """Train the runs of the sweep files that are not trained yet, in order.

    Args:
        only: train this run only, counted from 0; None for all.
        launch: the command that trains; `--config FILE` is appended to it.
        train: False writes the configs and links shared stages, and trains nothing.

    Raises:
        ConfigError: as `read_sweep_runs`, or `only` is not the number of a run.
    """
    count = len(read_sweep_runs(paths, overrides))
    if (single := single_run_file(paths)) is not None:
        log(single_run_message(single))
    if only is not None and not 0 <= only < count:
        raise ConfigError(f"--index: must be from 0 to {count - 1}, got {only}; --dry-run lists the sweep runs")
    outcomes: list[Outcome] = []
    with StopSignals() as stop:
        for number in range(count) if only is None else [only]:
            runs = read_sweep_runs(paths, overrides)  # again: the run before may have prepared data and tokenizer
            if any(outcome.state == "stopped" for outcome in outcomes):
                outcomes.append(Outcome(runs[number].name, "not run", None))
            else:
                log(f"[{number + 1}/{count}] {runs[number].name}")
                outcomes.append(_outcome(runs[number], runs, launch if train else (), stop, log))
    return outcomes


def single_run_message(path: Path) -> str:
    """The message for a file without a [sweep] table."""
    return f"{path}: has no [sweep], so it is a single run"


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """0 if every run is trained, 75 if one stopped early with its checkpoint saved, 1 if one failed."""
    states = {outcome.state for outcome in outcomes}
    if "stopped" in states:
        return STOPPED_EARLY
    return FAILURE if "failed" in states else SUCCESS


def _outcome(
    run: SweepRun | InvalidSweepRun,
    runs: Sequence[SweepRun | InvalidSweepRun],
    launch: Sequence[str],
    stop: StopSignals,
    log: Callable[[str], None],
) -> Outcome:
    """Train one run unless it is done; errors become its outcome."""
    if isinstance(run, InvalidSweepRun):
        log(f"  invalid: {run.problem}")
        return Outcome(run.name, "failed", None, run.problem)
    others = [other for other in runs if isinstance(other, SweepRun)]
    begin = time.monotonic()
    try:
        if run.is_done():
            log(f"  already trained: {run.folder}")
            return Outcome(run.name, "skipped", run.folder)
        status = _train(run, others, launch, stop, log)
    except StopRequested:
        return Outcome(run.name, "stopped", run.folder)
    except TitanError as error:
        log(f"  failed: {error}")
        return Outcome(run.name, "failed", run.folder, str(error))
    if status is None:
        return Outcome(run.name, "ready", run.folder)
    if status == STOPPED_EARLY or (stop.received and status):
        log("  stopped early; run the same command again to resume")
        return Outcome(run.name, "stopped", run.folder)
    if status:
        message = last_error(run.folder / CONSOLE_NAME, status)
        log(f"  failed: {message}")
        return Outcome(run.name, "failed", run.folder, message)
    log(f"  done in {time.monotonic() - begin:.0f} s")
    return Outcome(run.name, "done", run.folder)


def _train(
    run: SweepRun, others: Sequence[SweepRun], launch: Sequence[str], stop: StopSignals, log: Callable[[str], None]
) -> int | None:
    """Prepare the run's folder and run the launch command; its exit status, or None without a command."""
    with SharedStageLock(run, others, stop, log=log) as lock:
        require_own_run(run.folder, run.config)
        adopted = adopt_shared_stages(run, others)
        if adopted:
            log(f"  adopted {adopted}")
        config = run.folder / SWEEP_CONFIG_FILE
        make_folder(run.folder)
        write_run_config(config, run.config)
        if not launch:
            log(f"  ready: {config}")
            return None
        console = run.folder / CONSOLE_NAME
        log(f"  training; output in {console}")
        command = [*launch, "--config", str(config)]
        return train_in_process(command, console, stop, on_poll=lock.release_when_trained)
