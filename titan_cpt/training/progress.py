"""Console output of a run: a progress bar on a terminal, a line per logging interval elsewhere, and messages."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from titan_cpt.data.mixture import Leaf, leaves
from titan_cpt.planning.plan import Plan, StagePlan


class Display:
    """Prints the progress of a run.

    Args:
        steps_done: steps of the whole run that earlier sessions have done.
        shown: whether this rank prints; False on all ranks but 0.
    """

    def __init__(self, plan: Plan, console: Console, *, steps_done: int, shown: bool) -> None:
        self._plan = plan
        self._console = console
        self._shown = shown
        self._total_steps = sum(stage.steps for stage in plan.stages)
        self._start_step = steps_done
        self._start_time = time.perf_counter()
        self._live: Progress | None = None
        self._task = TaskID(0)

    def begin_stage(self, stage: StagePlan, steps_done: int) -> None:
        """Start the stage's progress bar."""
        if self._shown and self._console.is_terminal:
            title = f"stage {self._number(stage)} {stage.name}"
            columns = (TextColumn("[bold]{task.description}"), BarColumn(24), TextColumn("{task.fields[text]}"))
            self._live = Progress(*columns, console=self._console, refresh_per_second=4)
            self._task = self._live.add_task(title, total=stage.steps, completed=steps_done, text="")
            self._live.start()

    def transition(self, stage: StagePlan, start: Mapping[str, str]) -> None:
        """Print how a stage starts: its weights, optimizer state, LR, and the position in each dataset."""
        self.say(f"stage {stage.name} begins")
        for label, value in start.items():
            self.say(f"  {label:<9} {value}")
        for leaf in sorted(leaves(stage.tree), key=lambda leaf: (leaf.replayed, leaf.source)):
            self.say(f"  {'replay' if leaf.replayed else 'data':<9} {_position(leaf)}")

    def end_stage(self) -> None:
        """Stop the progress bar."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def step(self, stage: StagePlan, line: dict[str, Any]) -> None:
        """Print the metrics of a step, `line`; on a terminal, update the progress bar."""
        if not self._shown:
            return
        text = self._text(stage, line)
        if self._live is not None:
            self._live.update(self._task, completed=line["step"], text=text)
        else:
            self.say(f"stage {self._number(stage)} {stage.name} {text}")

    def say(self, message: str) -> None:
        """Print a message on a line of its own."""
        if self._shown:
            self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def _number(self, stage: StagePlan) -> str:
        return f"{self._plan.stages.index(stage) + 1}/{len(self._plan.stages)}"

    def _text(self, stage: StagePlan, line: dict[str, Any]) -> str:
        mfu = "" if math.isnan(line["mfu"]) else f"mfu {line['mfu']:.0%}  "
        step = line["step"]
        run_step = line["run_step"]
        return (
            f"step {step:,}/{stage.steps:,}  loss {line['loss_nats_per_token']:.4f}  lr {line['lr']:.2e}  "
            f"{line['tokens_per_s']:,.0f} tokens/s  {mfu}{line['tokens'] / 1e6:,.2f}M tokens  "
            f"eta {self._eta(run_step, stage.steps - step)} stage, "
            f"{self._eta(run_step, self._total_steps - run_step)} run"
        )

    def _eta(self, run_step: int, steps_left: int) -> str:
        """Time left at this session's mean speed, including validation and checkpoints."""
        steps_taken = run_step - self._start_step
        if steps_taken <= 0:
            return "?"
        seconds = round((time.perf_counter() - self._start_time) / steps_taken * steps_left)
        return f"{seconds // 3600}:{seconds % 3600 // 60:02}:{seconds % 60:02}"


def _position(leaf: Leaf) -> str:
    """The sequence at which a stage starts in a dataset, counted from 0 in the order of training."""
    if not leaf.replayed:
        position = "starts at its first sequence" if not leaf.first else f"continues at sequence {leaf.first:,}"
        return f"{leaf.source} {position}"
    if not leaf.seen:
        return f"of {leaf.source}"
    order = ", in a new order" if leaf.reshuffle_key else ""
    return f"of {leaf.source} from sequence {leaf.first % leaf.seen:,} of the {leaf.seen:,} trained on{order}"
