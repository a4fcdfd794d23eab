"""Tokens and FLOPs of a run's steps, from its plan.json: sequence length and batch size may differ between stages."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class TokenPhase(NamedTuple):
    """Consecutive steps of a stage with the same number of tokens.

    Attributes:
        first_step: steps of the stage before the phase.
        first_token: tokens of the stage before the phase.
        step_tokens: tokens of each of its steps, over all ranks.
    """

    first_step: int
    first_token: int
    step_tokens: int


@dataclass(frozen=True)
class StageTokens:
    """The tokens of a stage's steps.

    Attributes:
        before: tokens of all earlier stages of the run.
        steps: planned steps of the stage.
        phases: the first one begins with step 0.
        flops_per_token: 1 if it is unknown.
    """

    before: int
    steps: int
    phases: tuple[TokenPhase, ...]
    flops_per_token: float = 1.0

    def until(self, steps_done: int) -> int:
        """Tokens of the stage's first `steps_done` steps."""
        phase = self.phases[bisect_right(self.phases, steps_done, key=lambda each: each.first_step) - 1]
        return phase.first_token + (steps_done - phase.first_step) * phase.step_tokens

    def of_step(self, steps_done: int) -> int:
        """Tokens of the step after which `steps_done` steps of the stage are done."""
        return self.until(steps_done) - self.until(steps_done - 1)


class PlannedTokens:
    """The tokens of all steps of a run.

    Attributes:
        stages: by name, in the order of training.
        total: planned tokens of all stages.

    Args:
        plan: contents of plan.json. Without `seq_len` and `batch_sizes`, which older versions did not write, every step
            of a stage has `step_tokens`.
    """

    def __init__(self, plan: Mapping[str, Any]) -> None:
        self.stages: dict[str, StageTokens] = {}
        self.total = 0
        for stage in plan.get("stages", ()):
            sizes = stage.get("batch_sizes", [[0, plan.get("step_tokens", 0)]])
            tokens = StageTokens(self.total, stage["steps"], _phases(sizes, stage.get("seq_len", 1)))
            planned = tokens.until(stage["steps"])
            if planned and stage.get("flops"):
                tokens = StageTokens(tokens.before, tokens.steps, tokens.phases, stage["flops"] / planned)
            self.stages[stage["name"]] = tokens
            self.total += planned

    def at(self, stage: str, steps_done: int) -> int:
        """Tokens of the run after `steps_done` steps of a stage, those of earlier stages included."""
        if stage not in self.stages:
            return self.total
        return self.stages[stage].before + self.stages[stage].until(steps_done)

    def flops_between(self, stage: str, steps_done: int, *, whole_run: bool) -> float:
        """FLOPs from this step to the end of the stage, or of the run."""
        names = list(self.stages)
        current = self.stages[stage]
        left = current.flops_per_token * (current.until(current.steps) - current.until(steps_done))
        if whole_run:
            later = (self.stages[name] for name in names[names.index(stage) + 1 :])
            left += sum(each.flops_per_token * each.until(each.steps) for each in later)
        return left


def _phases(sizes: Sequence[Sequence[int]], seq_len: int) -> tuple[TokenPhase, ...]:
    """The phases of [first step, sequences of a step] pairs."""
    phases: list[TokenPhase] = []
    for first_step, sequences in sizes:
        tokens = 0
        if phases:
            last = phases[-1]
            tokens = last.first_token + (first_step - last.first_step) * last.step_tokens
        phases.append(TokenPhase(first_step, tokens, sequences * seq_len))
    return tuple(phases)
