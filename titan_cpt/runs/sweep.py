"""Several runs, one after another or as a Slurm array: what is done is skipped, what breaks does not stop the rest.

Each arm is trained by the ordinary command in a process of its own, so that nothing of one reaches the next. What arms
share is trained by the first that comes to it, under a lock, and adopted by the others.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from titan_cpt.common.file_lock import FileLock
from titan_cpt.common.files import make_folder
from titan_cpt.common.reading import is_there
from titan_cpt.common.recipe import fingerprint
from titan_cpt.common.run_folder import MANIFEST_FILE, METRICS_FILE
from titan_cpt.config.run_config import require_own_run, write_run_config
from titan_cpt.errors import AccessError, ConfigError, TitanError
from titan_cpt.reporting.comparison import compare, print_comparison
from titan_cpt.reporting.summary import labelled, read_runs
from titan_cpt.runs.sweep_runs import (
    InvalidSweepRun,
    SweepRun,
    adopt_shared_stages,
    read_sweep_runs,
    shared_stages,
    without_sweep,
)

CONFIG_NAME = "arm.toml"  # config.toml is the run's own record of what it was trained under
CONSOLE_NAME = "console.txt"
TRAIN = (sys.executable, "-m", "titan_cpt", "train")
_STOPPED_EARLY = 75
_SECONDS_BETWEEN_LOOKS = 0.5
_LINES_OF_A_MESSAGE = 6
_SINGLE_RUN = "{path}: has no [sweep], so it is a single run"


@dataclass(frozen=True)
class Outcome:
    """How an arm ended.

    Attributes:
        state: done, skipped (it was done before), ready (prepared and not trained), stopped, failed or not run.
        folder: the run's; None where there is no run.
        message: why it failed, in the words of the command that did.
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
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Train the arms of the files that are not trained yet, in order.

    Args:
        only: the number of the one arm to train, from 0; None for all.
        launch: the command that trains; it is given `--config FILE`.
        train: False writes the configs, adopts what is there, and leaves the training to others.

    Raises:
        ConfigError: as `read_sweep_runs`, or there is no arm of that number.
    """
    count = len(read_sweep_runs(paths, overrides))
    if (single := without_sweep(paths)) is not None:
        say(_SINGLE_RUN.format(path=single))
    if only is not None and not 0 <= only < count:
        raise ConfigError(f"--arm: must be from 0 to {count - 1}, got {only}; --plan lists the arms")
    outcomes: list[Outcome] = []
    with _Stop() as stop:
        for number in range(count) if only is None else [only]:
            arms = read_sweep_runs(paths, overrides)  # again: data and tokenizer may have come to be
            if any(outcome.state == "stopped" for outcome in outcomes):
                outcomes.append(Outcome(arms[number].name, "not run", None))
            else:
                say(f"[{number + 1}/{count}] {arms[number].name}")
                outcomes.append(_one(arms[number], arms, launch if train else (), stop, say))
    return outcomes


def _one(
    arm: SweepRun | InvalidSweepRun,
    arms: Sequence[SweepRun | InvalidSweepRun],
    launch: Sequence[str],
    stop: _Stop,
    say: Callable[[str], None],
) -> Outcome:
    if isinstance(arm, InvalidSweepRun):
        say(f"  cannot be: {arm.fault}")
        return Outcome(arm.name, "failed", None, arm.fault)
    others = [other for other in arms if isinstance(other, SweepRun)]
    begin = time.monotonic()
    try:
        if arm.is_done():
            say(f"  was trained before: {arm.folder}")
            return Outcome(arm.name, "skipped", arm.folder)
        with _turn(arm, others, stop, say) as has_shared_stages:
            require_own_run(arm.folder, arm.config)
            adopted = adopt_shared_stages(arm, others)
            if adopted:
                say(f"  adopted {adopted}")
            config = arm.folder / CONFIG_NAME
            make_folder(arm.folder)
            write_run_config(config, arm.config)
            if not launch:
                say(f"  ready: {config}")
                return Outcome(arm.name, "ready", arm.folder)
            say(f"  trains; its output is in {arm.folder / CONSOLE_NAME}")
            status = _launch([*launch, "--config", str(config)], arm.folder / CONSOLE_NAME, stop, has_shared_stages)
    except _Stopped:
        return Outcome(arm.name, "stopped", arm.folder)
    except TitanError as error:
        say(f"  failed: {error}")
        return Outcome(arm.name, "failed", arm.folder, str(error))
    if status == _STOPPED_EARLY or (stop.asked and status):
        say("  stopped early; the same command goes on")
        return Outcome(arm.name, "stopped", arm.folder)
    if status:
        message = _last_message(arm.folder / CONSOLE_NAME, status)
        say(f"  failed: {message}")
        return Outcome(arm.name, "failed", arm.folder, message)
    say(f"  done in {time.monotonic() - begin:.0f} s")
    return Outcome(arm.name, "done", arm.folder)


@contextmanager
def _turn(
    arm: SweepRun, others: Sequence[SweepRun], stop: _Stop, say: Callable[[str], None]
) -> Iterator[Callable[[], bool]]:
    """One arm at a time trains what is shared; yields what lets go of the turn once that is there.

    What is yielded is called now and then, and answers whether the turn is over.
    """
    shared = shared_stages(arm, others)
    if not shared:
        yield lambda: True
        return
    common = Path(os.path.commonpath([os.path.dirname(os.path.realpath(other.folder)) for other in others]))
    common.mkdir(parents=True, exist_ok=True)
    lock = FileLock(common / f".shared-{fingerprint(arm.plan.recipe_until(0))}.lock", warn=say)
    held = False

    def let_go() -> bool:
        nonlocal held
        with suppress(AccessError):  # not known yet: the lock stays until the run ends
            if held and is_there(arm.checkpoint(shared - 1) / MANIFEST_FILE):
                lock.release()
                held = False
        return not held

    try:
        _wait_for(lock, stop, say)
        held = True
        yield let_go
    finally:
        if held:
            lock.release()
        lock.close()


def _wait_for(lock: FileLock, stop: _Stop, say: Callable[[str], None]) -> None:
    waiting = False
    while not lock.acquire():
        if not waiting:
            holder = lock.holder()
            say(f"  waits for the arm that trains the stages they share{f' ({holder})' if holder else ''}")
        waiting = True
        if stop.asked:
            raise _Stopped
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _launch(command: Sequence[str], console: Path, stop: _Stop, look: Callable[[], bool]) -> int:
    """Run the command, its output into a file, and pass on what asks it to stop; its exit status."""
    with console.open("ab") as output:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        except OSError as error:
            raise ConfigError(f"--launch: {command[0]} cannot be run: {error.strerror}") from None
        told = False
        while True:
            look()
            if stop.asked and not told:
                process.send_signal(signal.SIGTERM)  # a second SIGINT would end it without a checkpoint
                told = True
            try:
                return process.wait(_SECONDS_BETWEEN_LOOKS)
            except subprocess.TimeoutExpired:
                continue


def _last_message(console: Path, status: int) -> str:
    """What a command that failed said last: from its last line that names an error on."""
    lines = [line for line in console.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    places = [place for place, line in enumerate(lines) if re.match(r"\w*(Error|Exception)\b", line)]
    said = lines[places[-1] : places[-1] + _LINES_OF_A_MESSAGE] if places else lines[-1:]
    return "\n".join(said) or f"ended with status {status} and said nothing"


class _Stopped(Exception):
    """EvalRequest to stop while waiting for a turn; nothing of the arm has begun."""


class _Stop:
    """Turns SIGTERM and SIGINT into a request that the arm under way is told of, and that no further one begins."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _Stop:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """0 where every arm is trained, 75 where one was stopped early with everything saved, 1 where one failed."""
    states = {outcome.state for outcome in outcomes}
    return _STOPPED_EARLY if "stopped" in states else int("failed" in states)


def print_outcomes(outcomes: Sequence[Outcome], console: Console) -> None:
    """A table of all arms with the losses they have come to, and why any failed."""
    begun = [outcome.folder for outcome in outcomes if outcome.folder and (outcome.folder / METRICS_FILE).exists()]
    records = labelled(read_runs(begun, lambda message: console.print(escape(message), highlight=False)))
    names = {record.folder: record.name for record in records}
    failed = {
        names.get(each.folder, each.name) if each.folder else each.name: each.message
        for each in outcomes
        if each.state == "failed"
    }
    print_comparison(compare(records), console, failed)


def print_sweep_plan(paths: Sequence[Path], overrides: Sequence[tuple[str, str]], console: Console) -> None:
    """Number, name, budget and cost of every arm, and which of its stages others share."""
    arms = read_sweep_runs(paths, overrides)
    sound = [arm for arm in arms if isinstance(arm, SweepRun)]
    table = Table(header_style="bold")
    for column in ("arm", "name", "plan", "steps", "tokens", "FLOPs", "shared stages", "state"):
        table.add_column(column, justify="right" if column in ("arm", "steps", "tokens", "FLOPs") else "left")
    for number, arm in enumerate(arms):
        if isinstance(arm, InvalidSweepRun):
            table.add_row(str(number), escape(arm.name), *[""] * 5, "cannot be")
            continue
        steps = sum(stage.steps for stage in arm.plan.stages)
        tokens = steps * arm.plan.step_tokens
        shared = [stage.name for stage in arm.plan.stages[: shared_stages(arm, sound)]]
        flops = arm.plan.spec.flops_per_token(arm.plan.seq_len) * tokens
        cells = (str(number), escape(arm.name), arm.plan.fingerprint, f"{steps:,}", f"{tokens:,}", f"{flops:.2e}")
        table.add_row(*cells, ", ".join(shared), "done" if arm.is_done() else "")
    console.print(table)
    if (single := without_sweep(paths)) is not None:
        console.print(_SINGLE_RUN.format(path=single), highlight=False, markup=False, soft_wrap=True)
    for arm in arms:
        if isinstance(arm, InvalidSweepRun):
            console.print(f"[bold]{escape(arm.name)}[/]: {escape(arm.fault)}", highlight=False)
