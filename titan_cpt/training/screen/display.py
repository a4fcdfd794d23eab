"""What a run prints: a table of steps, on a terminal with a progress bar below it, and messages."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from titan_cpt.common.console import RunConsole, Verbosity
from titan_cpt.common.readable import duration, steps
from titan_cpt.common.text import wrapped
from titan_cpt.data.mixture import Leaf, leaves
from titan_cpt.planning.plan import Plan, StagePlan
from titan_cpt.training.screen.step_table import StepTable

_WIDEST_BAR = 80  # of name, bar and numbers: a terminal that shrinks to this does not tear it
_SECONDS_BETWEEN_ROWS = 1.0  # on a terminal, where rich needs about a millisecond for a row
_BARS_PER_SECOND = 1


class Display:
    """Prints the progress of a run.

    Args:
        console: prints on rank 0 only.
        steps_done: steps of the whole run that earlier sessions have done.
    """

    def __init__(self, plan: Plan, console: RunConsole, *, steps_done: int) -> None:
        self._plan = plan
        self._console = console
        self._total_steps = sum(stage.steps for stage in plan.stages)
        self._start_step = steps_done
        self._start_time = time.perf_counter()
        self._table = StepTable()
        self._bar: _Bar | None = None
        self._live: Live | None = None
        self._row_time = -math.inf
        self._stage_start = 0.0
        self._stage_start_step = 0
        self._seconds: dict[str, float] = {}

    def begin_stage(self, stage: StagePlan, steps_done: int) -> None:
        """Start the stage's table, and on a terminal its progress bar."""
        self._table = StepTable()
        self._stage_start, self._stage_start_step = time.perf_counter(), steps_done
        self._seconds = {}
        if self._console.is_terminal and not self._console.quiet:
            self._bar = _Bar(f"{stage.name} {self._number(stage)}", steps_done, stage.steps)
            self._live = Live(self._bar, console=self._console, refresh_per_second=_BARS_PER_SECOND, transient=True)
            self._live.start()

    def transition(self, stage: StagePlan, start: Mapping[str, str]) -> None:
        """Print how a stage starts: its weights, optimizer state, LR, and the position in each dataset."""
        self.say(f"stage {self._number(stage)} {stage.name} begins: {stage.steps:,} steps")
        for label, value in start.items():
            self.say(f"  {label:<9} {value}", wrap=True)
        for leaf in sorted(leaves(stage.tree), key=lambda leaf: (leaf.replayed, leaf.source)):
            self.say(f"  {'replay' if leaf.replayed else 'data':<9} {_position(leaf)}", wrap=True)

    def end_stage(self, stage: StagePlan, steps_done: int) -> None:
        """Stop the progress bar; print how many steps are done and how long this session's took."""
        self.close()
        seconds = time.perf_counter() - self._stage_start
        done = "done" if steps_done == stage.steps else f"of {stage.steps:,} done"
        taken = steps_done - self._stage_start_step
        in_session = f"{duration(seconds)}" if self._stage_start_step == 0 else f"{taken:,} in {duration(seconds)}"
        self.result(f"stage {self._number(stage)} {stage.name}: {steps_done:,} steps {done} ({in_session})")
        if self._seconds:
            parts = [f"{name} {spent:.1f} s" for name, spent in self._seconds.items()]
            self.detail(f"  {seconds:.1f} s in all, of these {', '.join(parts)}")

    def close(self) -> None:
        """Remove the progress bar, also after an error: it hides the cursor."""
        if self._live is not None:
            self._live.stop()
            self._live = self._bar = None

    def step(self, stage: StagePlan, line: dict[str, Any]) -> None:
        """Print the metrics of a step, `line`; on a terminal at most one row a second, and update the progress bar."""
        if not self._console.shown:
            return
        stage_eta = self._eta(line["run_step"], line["run_step"] + stage.steps - line["step"])
        run_eta = self._eta(line["run_step"], self._total_steps)
        if self._bar is not None:
            self._bar.update(line["step"], stage_eta, run_eta)
            now = time.perf_counter()
            if now - self._row_time < _SECONDS_BETWEEN_ROWS and line["step"] < stage.steps:
                return
            self._row_time = now
        for text in self._table.lines(line, stage_eta, run_eta):
            self.say(text)

    def say(self, message: str, *, wrap: bool = False) -> None:
        """Print a message on a line of its own.

        Args:
            wrap: on several lines if it is wider than the terminal; not for paths, which people copy.
        """
        lines = wrapped(message, self._console.width) if wrap else [message]
        for line in lines:
            self._console.print_line(line)

    def result(self, message: str, *, wrap: bool = False) -> None:
        """Print a result, which --quiet does not hide."""
        with self._console.level(Verbosity.QUIET):
            self.say(message, wrap=wrap)

    def warn(self, message: str) -> None:
        """Print a warning, which --quiet does not hide."""
        self.result(message)

    def results(self, print_on: Callable[[Console], None]) -> None:
        """Print a table of results, which --quiet does not hide."""
        with self._console.level(Verbosity.QUIET), self._console.wide():
            print_on(self._console)

    def detail(self, message: str) -> None:
        """Print a message with --verbose only."""
        with self._console.level(Verbosity.VERBOSE):
            self.say(message)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to this stage's `name`, which --verbose prints."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin

    def _number(self, stage: StagePlan) -> str:
        return f"{self._plan.stages.index(stage) + 1}/{len(self._plan.stages)}"

    def _eta(self, run_step: int, last_step: int) -> float:
        """Seconds until a step of the run at this session's mean FLOP/s, validation and checkpoints included.

        NaN before the session's first step.
        """
        done = self._plan.flops_at(run_step)
        in_session = done - self._plan.flops_at(self._start_step)
        if in_session <= 0:
            return math.nan
        return (time.perf_counter() - self._start_time) / in_session * (self._plan.flops_at(last_step) - done)


class _Bar:
    """A progress bar of one line, as wide as the terminal is at that moment."""

    def __init__(self, title: str, steps_done: int, total: int) -> None:
        self._title = title
        self._total = total
        self.update(steps_done, math.nan, math.nan)

    def update(self, steps_done: int, stage_eta_s: float, run_eta_s: float) -> None:
        """Show this position from the next drawing on."""
        self._steps_done, self._etas = steps_done, (stage_eta_s, run_eta_s)

    def __rich_console__(self, _console: Any, options: ConsoleOptions) -> RenderResult:
        """For rich: the line as text."""
        width = min(options.max_width - 1, _WIDEST_BAR)
        yield Text(self.line(width, ascii_only=options.ascii_only), style="bold", no_wrap=True, overflow="crop")

    def line(self, width: int, *, ascii_only: bool) -> str:
        """Title, bar, position and time left in `width` columns; the bar and the title give way first."""
        stage_eta, run_eta = map(duration, self._etas)
        share = f"{self._steps_done / self._total:4.0%}"
        position = f"{share} {steps(self._steps_done)}/{steps(self._total)}  ETA {stage_eta}, run {run_eta}"
        room = width - len(position) - 1
        title = self._title if len(self._title) <= max(room, 0) else _cut(self._title, room)
        room -= len(title) + 1
        full, empty = "#-" if ascii_only else "━─"
        bar = ""
        if room >= 5:
            done = int(room * self._steps_done / self._total)
            bar = f" {full * done}{empty * (room - done)}"
        return f"{title}{bar} {position}".strip()[:width]


def _cut(title: str, width: int) -> str:
    return f"{title[: width - 2]}.." if width >= 4 else ""


def _position(leaf: Leaf) -> str:
    """The sequence at which a stage starts in a dataset, counted from 0 in the order of training."""
    if not leaf.replayed:
        position = "starts at its first sequence" if not leaf.first else f"continues at sequence {leaf.first:,}"
        return f"{leaf.source} {position}"
    if leaf.text is not None:
        begin, end = leaf.text.first_token % leaf.text.tokens, leaf.text.tokens
        order = ", in a new order" if leaf.text.reshuffle_key else ""
        return f"of {leaf.source} from token {begin:,} of the {end:,} trained on{order}"
    if not leaf.seen:
        return f"of {leaf.source}"
    order = ", in a new order" if leaf.reshuffle_key else ""
    return f"of {leaf.source} from sequence {leaf.first % leaf.seen:,} of the {leaf.seen:,} trained on{order}"
