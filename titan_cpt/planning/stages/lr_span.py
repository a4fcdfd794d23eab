"""The span of a learning-rate schedule: its stage, and the stages directly after it whose `lr` continues it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from titan_cpt.common.batch_sizes import BatchSizes
from titan_cpt.config.lr import ContinueLR
from titan_cpt.config.stages import StageConfig


@dataclass(frozen=True)
class StageLength:
    """The length of a stage.

    Attributes:
        name: the stage's name.
        steps: optimizer steps.
        seq_len: sequence length in tokens.
        batch_sizes: global batch size of every step.
    """

    name: str
    steps: int
    seq_len: int
    batch_sizes: BatchSizes

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return self.batch_sizes.sequences_before(self.steps) * self.seq_len


@dataclass(frozen=True)
class LRSpan:
    """The stages that one schedule spans.

    Attributes:
        first: the stage that describes the schedule.
        lengths: the length of every stage, in order.
    """

    first: StageConfig
    lengths: tuple[StageLength, ...]

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(length.steps for length in self.lengths)

    @property
    def names(self) -> list[str]:
        """The names of the stages."""
        return [length.name for length in self.lengths]

    def steps_before(self, name: str) -> int:
        """Optimizer steps of the span before one of its stages."""
        return sum(length.steps for length in self.lengths[: self.names.index(name)])

    def step_at(self, tokens: int) -> Fraction:
        """The exact point, in steps of the span, at which this number of its tokens is trained; also after its end."""
        steps = 0
        left = tokens
        for length in self.lengths[:-1]:
            if left <= length.tokens:
                return steps + length.batch_sizes.step_at(Fraction(left, length.seq_len))
            steps += length.steps
            left -= length.tokens
        return steps + self.lengths[-1].batch_sizes.step_at(Fraction(left, self.lengths[-1].seq_len))


def lr_spans(stages: Sequence[StageConfig], lengths: Sequence[StageLength]) -> dict[str, LRSpan]:
    """The span of every stage's schedule, by the stage's name.

    Args:
        lengths: of the stages, in their order.
    """
    found: dict[str, LRSpan] = {}
    for first, last in _borders(stages):
        span = LRSpan(stages[first], tuple(lengths[first:last]))
        found |= dict.fromkeys(span.names, span)
    return found


def _borders(stages: Sequence[StageConfig]) -> Iterator[tuple[int, int]]:
    """The index of the first stage of each span, and of the first stage after it."""
    firsts = [index for index, stage in enumerate(stages) if not isinstance(stage.lr, ContinueLR)]
    yield from zip(firsts, [*firsts[1:], len(stages)], strict=True)
