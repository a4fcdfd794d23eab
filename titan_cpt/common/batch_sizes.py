"""Global batch sizes of a training stage: how many sequences each optimizer step has."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple


class BatchPhase(NamedTuple):
    """Consecutive steps with the same global batch size.

    Attributes:
        first_step: 0-based step with which the phase begins.
        first_sequence: sequences of the stage before that step.
        size: sequences of each of its steps, over all ranks.
    """

    first_step: int
    first_sequence: int
    size: int


@dataclass(frozen=True)
class BatchSizes:
    """The global batch size of every step, as phases of constant size; the first begins at step 0."""

    phases: tuple[BatchPhase, ...]

    @classmethod
    def constant(cls, size: int) -> BatchSizes:
        """Every step has `size` sequences."""
        return cls((BatchPhase(0, 0, size),))

    @classmethod
    def of_steps(cls, sizes: Iterable[Sequence[int]]) -> BatchSizes:
        """The phases of (first step, sequences of a step) in ascending order; the first one begins with step 0."""
        phases: list[BatchPhase] = []
        for first_step, size in sizes:
            first_sequence = cls(tuple(phases)).sequences_before(first_step) if phases else 0
            phases.append(BatchPhase(first_step, first_sequence, size))
        return cls(tuple(phases))

    @classmethod
    def ramp(cls, sizes: Sequence[tuple[int, int]], *, seq_len: int) -> BatchSizes:
        """A batch-size ramp: each size begins with the first step that begins at or after its number of tokens.

        Args:
            sizes: (tokens of the stage, sequences of a step) in ascending order; the first one begins at 0.
            seq_len: tokens of a sequence.
        """
        phases: list[BatchPhase] = []
        for tokens, size in sizes:
            step = sequence = 0
            if phases:
                last = phases[-1]
                steps = max(0, -(-(tokens - last.first_sequence * seq_len) // (last.size * seq_len)))
                step, sequence = last.first_step + steps, last.first_sequence + steps * last.size
                if not steps:  # the step before the last threshold went beyond this one too
                    phases.pop()
            if not phases or phases[-1].size != size:
                phases.append(BatchPhase(step, sequence, size))
        return cls(tuple(phases))

    def within(self, steps: int) -> tuple[BatchPhase, ...]:
        """The phases that begin in the first `steps` steps."""
        return tuple(phase for phase in self.phases if phase.first_step < steps)

    def at(self, step: int) -> int:
        """The global batch size of a 0-based step, in sequences."""
        return self._phase_of_step(step).size

    def sequences_before(self, step: int) -> int:
        """The number of sequences in the steps before a 0-based step."""
        phase = self._phase_of_step(step)
        return phase.first_sequence + (step - phase.first_step) * phase.size

    def step_of(self, sequence: int) -> int:
        """The 0-based step that contains a 0-based sequence of the stage."""
        phase = self.phases[bisect_right(self.phases, sequence, key=lambda each: each.first_sequence) - 1]
        return phase.first_step + (sequence - phase.first_sequence) // phase.size

    def step_at(self, sequences: Fraction) -> Fraction:
        """The exact point in steps at which a number of sequences is trained; also after the last step."""
        phase = max(
            (each for each in self.phases if each.first_sequence <= sequences), key=lambda each: each.first_step
        )
        return Fraction(phase.first_step) + (sequences - phase.first_sequence) / phase.size

    def _phase_of_step(self, step: int) -> BatchPhase:
        return self.phases[bisect_right(self.phases, step, key=lambda each: each.first_step) - 1]
