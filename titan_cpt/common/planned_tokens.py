"""Tokens and FLOPs of a run's steps, from its plan.json: sequence length and batch size may differ between stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from titan_cpt.common.batch_sizes import BatchSizes


@dataclass(frozen=True)
class StageTokens:
    """The tokens of a stage's steps.

    Attributes:
        before: tokens of all earlier stages of the run.
        steps: planned steps of the stage.
        batch_sizes: sequences of every step.
        seq_len: tokens of a sequence.
        flops_per_token: 1 if it is unknown.
    """

    before: int
    steps: int
    batch_sizes: BatchSizes
    seq_len: int
    flops_per_token: float = 1.0

    def until(self, steps_done: int) -> int:
        """Tokens of the stage's first `steps_done` steps."""
        return self.batch_sizes.sequences_before(steps_done) * self.seq_len

    def of_step(self, steps_done: int) -> int:
        """Tokens of the step after which `steps_done` steps of the stage are done."""
        return self.batch_sizes.at(steps_done - 1) * self.seq_len


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
            tokens = StageTokens(self.total, stage["steps"], BatchSizes.of_steps(sizes), stage.get("seq_len", 1))
            planned = tokens.until(stage["steps"])
            if planned and stage.get("flops"):
                tokens = replace(tokens, flops_per_token=stage["flops"] / planned)
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
