"""Where a plan departs from what is known to work, and why that matters: notes for the user, never a refusal.

Sources: Ibrahim et al. 2024, arXiv:2403.08763 (re-warming, re-decaying, replay); Muennighoff et al. 2023,
arXiv:2305.16264 (repeated data). docs/recipes.md says what to choose instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from titan_cpt.planning.plan import StageCheckpoint, StagePlan

MOST_EPOCHS = 4  # up to here repeated tokens are worth nearly what new ones are: Muennighoff et al. 2023, section 5
_JUMP = 2.0  # a first step at more than twice the LR that the weights were left at is a jump
_SAME = 1.05  # LRs that differ by less are called the same: a peak lies between two steps
_DIVERGES = 0.1  # ten times the highest peak that recipes for AdamW use, small models included
_DECAYED = 0.5  # below half its peak an LR has decayed


def stage_notes(stages: Sequence[StagePlan]) -> Iterator[str]:
    """A note for every departure, in the order of the stages."""
    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        yield from _many_epochs(stage)
        yield from _far_too_high(stage)
        if stage.init == "random":
            continue
        yield from _no_replay(stage, by_name)
        if isinstance(stage.init, StageCheckpoint):
            lineage = list(_lineage(stage, by_name))
            yield from _rates(stage, left_at=_left_at(stage.init, by_name), earlier=max(map(_peak, lineage)))


def _far_too_high(stage: StagePlan) -> Iterator[str]:
    if _peak(stage) >= _DIVERGES:
        yield (
            f"stages.{stage.name}.lr: its peak {_peak(stage):.3g} is far above what AdamW trains with (1e-5 to 1e-2): "
            "the loss will diverge"
        )


def _many_epochs(stage: StagePlan) -> Iterator[str]:
    forgotten = "" if stage.init == "random" else ", and the old data is forgotten still"
    for name, use in stage.use_by_dataset.items():
        new = use.epochs * (use.tokens - use.replayed_tokens) / use.tokens if use.epochs else 0.0
        if new > MOST_EPOCHS:
            yield (
                f"stages.{stage.name}: goes {new:.1f} times over {name}; beyond {MOST_EPOCHS} epochs repeated tokens "
                f"teach less and less{forgotten}: shorten the stage, or mix in other data"
            )


def _no_replay(stage: StagePlan, by_name: Mapping[str, StagePlan]) -> Iterator[str]:
    seen = {name for earlier in _lineage(stage, by_name) for name in earlier.datasets}
    new = [name for name in stage.datasets if name not in seen]
    if new and not any(use.replayed_tokens for use in stage.use_by_dataset.values()):
        yield (
            f"stages.{stage.name}: {', '.join(new)} is new to these weights and nothing is replayed, so that much of "
            "what they know will be forgotten (in the paper 0.27 nats on the Pile for more English, 1.39 for German): "
            "replay = { fraction = 0.05 }, 0.01 for data much like the old, 0.25 for a new language"
        )


def _rates(stage: StagePlan, *, left_at: float, earlier: float) -> Iterator[str]:
    first, peak = stage.lr_at(0), _peak(stage)
    if first > _JUMP * left_at and stage.recipe.get("lr.warmup_until") == "0":
        yield (
            f"stages.{stage.name}.lr: begins at {first:.3g} without a warm-up, from weights left at {left_at:.3g}: the "
            "loss leaps up first; the paper ends level whatever the length, and warmup_until = 0.01 spares the leap"
        )
    if peak > _SAME * earlier:
        yield (
            f"stages.{stage.name}.lr: its peak {peak:.3g} is above the {earlier:.3g} that these weights were trained "
            "with: the new data is learnt faster and more of the old is forgotten, and training may become unstable"
        )
    if peak <= _SAME * left_at and left_at < _DECAYED * earlier:
        yield (
            f"stages.{stage.name}.lr: stays at or below {left_at:.3g}, to which the LR of these weights had decayed: "
            f"little is forgotten and little is learnt; re-warm towards {earlier:.3g} and decay again to adapt"
        )


def _lineage(stage: StagePlan, by_name: Mapping[str, StagePlan]) -> Iterator[StagePlan]:
    """The stages that the weights went through before this one."""
    while isinstance(stage.init, StageCheckpoint):
        stage = by_name[stage.init.stage]
        yield stage


def _left_at(point: StageCheckpoint, by_name: Mapping[str, StagePlan]) -> float:
    return by_name[point.stage].lr_at(max(point.steps_done - 1, 0))


def _peak(stage: StagePlan) -> float:
    """The stage's highest LR, which lies at one of its phases' borders."""
    borders = {math.floor(phase.end) + side for phase in stage.schedule for side in (-1, 0)}
    return max(stage.lr_at(step) for step in {0, *borders} if 0 <= step < stage.steps)
