"""Learning-rate schedules: the table `lr` of a stage, one class for each schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from titan_cpt.config.types import (
    NonNegativeFloat,
    Position,
    PositiveFloat,
    Table,
    fault,
)


class _LR(Table):
    @model_validator(mode="after")
    def _min_below_max(self) -> _LR:
        low, high = getattr(self, "min", None), getattr(self, "max", None)
        if low is not None and high is not None and low > high:
            raise fault(f"min must not be above max ({high:g}), got {low:g}")
        return self


class CosineLR(_LR):
    """lr = { schedule = "cosine" }: warm-up, then half a cosine to the stage's end."""

    schedule: Literal["cosine"]
    max: PositiveFloat
    """Peak LR."""
    min: NonNegativeFloat | None = None
    """LR of the last step; left out, a tenth of max."""
    warmup_until: Position = 0.01
    """End point of the warm-up."""


class LinearLR(_LR):
    """lr = { schedule = "linear" }: warm-up, then a straight line to the stage's end."""

    schedule: Literal["linear"]
    max: PositiveFloat
    """Peak LR."""
    min: NonNegativeFloat | None = None
    """LR of the last step; left out, a tenth of max."""
    warmup_until: Position = 0.01
    """End point of the warm-up."""


class ConstantLR(_LR):
    """lr = { schedule = "constant" }: max all the way, after a warm-up if one is asked for."""

    schedule: Literal["constant"]
    max: PositiveFloat
    """The LR."""
    warmup_until: Position = 0
    """End point of the warm-up; none unless asked for."""


class _InfiniteLR(_LR):
    max: PositiveFloat | None = None
    """Peak LR; a later stage, which has neither warm-up nor cool-down, needs none."""
    constant: PositiveFloat
    """LR of the constant phase, where the next stage goes on."""
    min: PositiveFloat | None = None
    """LR at the end of the annealing; left out, a tenth of max, or of constant where there is no max."""
    warmup_until: Position = 0.01
    """End point of the warm-up; 0 in a later stage."""
    cooldown_until: Position
    """End point of the cool-down from max to constant; 0 in a later stage."""
    constant_until: Position
    """End point of the constant phase; 1.0 does not anneal."""

    @model_validator(mode="after")
    def _max_where_it_is_used(self) -> _InfiniteLR:
        starts_constant = self.warmup_until == 0 and self.cooldown_until == 0
        if self.max is None and not starts_constant:
            raise fault("max is missing; only a stage with warmup_until = 0 and cooldown_until = 0 needs none")
        if self.max is not None and self.constant > self.max:
            raise fault(f"constant must not be above max ({self.max:g}), got {self.constant:g}")
        if self.min is not None and self.min > self.constant:
            raise fault(f"min must not be above constant ({self.constant:g}), got {self.min:g}")
        return self


class InfiniteCosineLR(_InfiniteLR):
    """lr = { schedule = "infinite_cosine" }: warm-up, cosine cool-down, constant, annealing."""

    schedule: Literal["infinite_cosine"]


class InfiniteInvSqrtLR(_InfiniteLR):
    """lr = { schedule = "infinite_inv_sqrt" }: warm-up, inverse-square-root cool-down, constant, annealing."""

    schedule: Literal["infinite_inv_sqrt"]
    alpha: PositiveFloat = 10.0
    """Steepness of the cool-down."""


class WsdLR(_LR):
    """lr = { schedule = "wsd" }: warm-up, stable, decay."""

    schedule: Literal["wsd"]
    max: PositiveFloat
    """LR of the stable phase."""
    min: NonNegativeFloat | None = None
    """LR of the last step; left out, a tenth of max. 0 is legal but for an exponential decay."""
    warmup_until: Position = 0.01
    """End point of the warm-up."""
    decay_from: Position
    """End point of the stable phase."""
    decay: Literal["linear", "sqrt", "exponential", "cosine"]
    """Shape of the decay; sqrt is 1 - sqrt(x)."""


class InvSqrtLR(_LR):
    """lr = { schedule = "inv_sqrt" }: warm-up, then an inverse square root without end."""

    schedule: Literal["inv_sqrt"]
    max: PositiveFloat
    """Peak LR."""
    min: NonNegativeFloat | None = None
    """Floor; left out, a tenth of max."""
    warmup_until: Position = 0.01
    """End point of the warm-up."""
    timescale: Position
    """How long after the warm-up the LR is max / sqrt(2): a share, steps or tokens like the end points."""


LR = Annotated[
    CosineLR | LinearLR | ConstantLR | InfiniteCosineLR | InfiniteInvSqrtLR | WsdLR | InvSqrtLR,
    Field(discriminator="schedule"),
]
