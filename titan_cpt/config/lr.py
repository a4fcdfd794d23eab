"""Learning-rate schedules: the table `lr` of a stage, one class for each schedule.

The formulas and their sources are in planning/lr_schedules.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from titan_cpt.config.types import EndPoint, NonNegativeFloat, PositiveFloat, Table, validation_error


class _LR(Table):
    @model_validator(mode="after")
    def _min_below_max(self) -> _LR:
        low = getattr(self, "min", None)
        high = getattr(self, "max", None)
        if low is not None and high is not None and low > high:
            raise validation_error(f"min must not be above max ({high:g}), got {low:g}")
        return self


class CosineLR(_LR):
    """lr = { schedule = "cosine" }: linear warm-up, then half a cosine down to min at the end of the stage."""

    schedule: Literal["cosine"]
    """The schedule's name."""
    max: PositiveFloat
    """Peak learning rate."""
    min: NonNegativeFloat | None = None
    """Learning rate of the last step. Unset: max / 10."""
    warmup_until: EndPoint = 0.01
    """End of the learning-rate warm-up; 0: no warm-up."""


class LinearLR(_LR):
    """lr = { schedule = "linear" }: linear warm-up, then linear decay to min at the end of the stage."""

    schedule: Literal["linear"]
    """The schedule's name."""
    max: PositiveFloat
    """Peak learning rate."""
    min: NonNegativeFloat | None = None
    """Learning rate of the last step. Unset: max / 10."""
    warmup_until: EndPoint = 0.01
    """End of the learning-rate warm-up; 0: no warm-up."""


class ConstantLR(_LR):
    """lr = { schedule = "constant" }: constant learning rate, after an optional linear warm-up."""

    schedule: Literal["constant"]
    """The schedule's name."""
    max: PositiveFloat
    """The learning rate."""
    warmup_until: EndPoint = 0
    """End of the learning-rate warm-up; 0: no warm-up."""


class _InfiniteLR(_LR):
    max: PositiveFloat | None = None
    """Peak learning rate. Unset: only in a stage that continues the constant phase (warmup_until = 0 and
    cooldown_until = 0)."""
    constant: PositiveFloat
    """Learning rate of the constant phase, from which the next stage continues."""
    min: PositiveFloat | None = None
    """Learning rate at the end of the annealing phase. Unset: max / 10, or constant / 10 without max."""
    warmup_until: EndPoint = 0.01
    """End of the learning-rate warm-up; 0 in a stage that continues the constant phase."""
    cooldown_until: EndPoint
    """End of the cool-down from max to constant; 0 in a stage that continues the constant phase."""
    constant_until: EndPoint
    """End of the constant phase, where annealing starts; 1.0: no annealing."""

    @model_validator(mode="after")
    def _phases_have_their_rates(self) -> _InfiniteLR:
        starts_constant = self.warmup_until == 0 and self.cooldown_until == 0
        if self.max is None and not starts_constant:
            raise validation_error(
                "max is missing; it may be omitted only if warmup_until and cooldown_until are both set to 0"
            )
        if self.max is not None and self.constant > self.max:
            raise validation_error(f"constant must not be above max ({self.max:g}), got {self.constant:g}")
        if self.min is not None and self.min > self.constant:
            raise validation_error(f"min must not be above constant ({self.constant:g}), got {self.min:g}")
        return self


class InfiniteCosineLR(_InfiniteLR):
    """lr = { schedule = "infinite_cosine" }: warm-up, cosine cool-down, constant phase, annealing."""

    schedule: Literal["infinite_cosine"]
    """The schedule's name."""


class InfiniteInvSqrtLR(_InfiniteLR):
    """lr = { schedule = "infinite_inv_sqrt" }: warm-up, inverse-square-root cool-down, constant phase, annealing."""

    schedule: Literal["infinite_inv_sqrt"]
    """The schedule's name."""
    alpha: PositiveFloat = 10.0
    """Steepness of the cool-down."""


class WsdLR(_LR):
    """lr = { schedule = "wsd" }: warmup-stable-decay: linear warm-up, stable phase at max, decay to min."""

    schedule: Literal["wsd"]
    """The schedule's name."""
    max: PositiveFloat
    """Learning rate of the stable phase."""
    min: NonNegativeFloat | None = None
    """Learning rate of the last step. Unset: max / 10. 0 is allowed except for an exponential decay."""
    warmup_until: EndPoint = 0.01
    """End of the learning-rate warm-up; 0: no warm-up."""
    decay_from: EndPoint
    """End of the stable phase, where the decay starts."""
    decay: Literal["linear", "sqrt", "exponential", "cosine"]
    """Shape of the decay; sqrt is 1 - sqrt(x)."""


class InvSqrtLR(_LR):
    """lr = { schedule = "inv_sqrt" }: linear warm-up, then inverse-square-root decay without an end."""

    schedule: Literal["inv_sqrt"]
    """The schedule's name."""
    max: PositiveFloat
    """Peak learning rate."""
    min: NonNegativeFloat | None = None
    """Lower bound of the learning rate. Unset: max / 10."""
    warmup_until: EndPoint = 0.01
    """End of the learning-rate warm-up; 0: no warm-up."""
    timescale: EndPoint
    """Time after the warm-up at which the learning rate has fallen to max / sqrt(2): a fraction of the stage, steps or
    tokens, as for an end point."""


class ContinueLR(Table):
    """lr = { schedule = "continue" }: the schedule of the stage before spans this stage too, so that the data changes
    under one schedule.

    End points of that schedule count over all stages that it spans: a fraction is a share of their steps together. The
    stage starts from the end of the stage before, with its optimizer state.
    """

    schedule: Literal["continue"]
    """The schedule's name."""


LR = Annotated[
    CosineLR | LinearLR | ConstantLR | InfiniteCosineLR | InfiniteInvSqrtLR | WsdLR | InvSqrtLR | ContinueLR,
    Field(discriminator="schedule"),
]
