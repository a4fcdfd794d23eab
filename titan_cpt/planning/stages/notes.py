"""Notes on stages that differ from published recipes for continual pre-training: epochs, replay, peak LR, warm-up.

A note is a warning; the plan is valid. Sources: Ibrahim et al. 2024, arXiv:2403.08763 (re-warming, re-decaying,
replay); Muennighoff et al. 2023, arXiv:2305.16264 (repeated data). docs/recipes.md has the recommended values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from titan_cpt.planning.plan import StageCheckpoint, StagePlan, ancestors, schedule_span
from titan_cpt.planning.stages.context_notes import NEW_WEIGHTS, context_notes

MAX_EPOCHS = 4  # repeated tokens are worth almost as much as new ones up to here: Muennighoff et al. 2023, section 5
_LR_JUMP = 2.0  # ratio of the first LR of a stage to the last LR before it, from which a warm-up is recommended
_EQUAL_LR = 1.05  # LRs within this ratio count as equal: the peak of a schedule is between two steps
_DIVERGING_LR = 0.1  # ten times the highest peak LR in published recipes for AdamW, small models included
_DECAYED = 0.5  # an LR below half of the peak counts as decayed


def stage_notes(stages: Sequence[StagePlan]) -> Iterator[str]:
    """The notes of all stages, in order."""
    yield from context_notes(stages, NEW_WEIGHTS)
    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        yield from _many_epochs(stage)
        yield from _diverging_peak(stage)
        if stage.init == "random":
            continue
        yield from _no_replay(stage, by_name)
        if isinstance(stage.init, StageCheckpoint) and not stage.schedule_offset:
            earlier_peak = max(earlier.peak_lr for earlier in ancestors(stage, by_name))
            peak = max(spanned.peak_lr for spanned in schedule_span(stage, stages))
            last_lr = _last_lr(stage.init, by_name)
            yield from lr_changes(stage, peak=peak, last_lr=last_lr, earlier_peak=earlier_peak)
            yield from _thawed(stage, by_name[stage.init.stage])


def _diverging_peak(stage: StagePlan) -> Iterator[str]:
    if stage.peak_lr >= _DIVERGING_LR:
        yield (
            f"stages.{stage.name}.lr: its peak {stage.peak_lr:.3g} is far above the usual range of AdamW (1e-5 to "
            "1e-2): the loss will diverge"
        )


def _many_epochs(stage: StagePlan) -> Iterator[str]:
    forgotten = "" if stage.init == "random" else ", while more of the old data is forgotten"
    for name, use in stage.use_by_dataset.items():
        new = use.epochs * (use.tokens - use.replayed_tokens) / use.tokens if use.epochs else 0.0
        if new > MAX_EPOCHS:
            yield (
                f"stages.{stage.name}: trains {new:.1f} epochs on {name}; beyond {MAX_EPOCHS} epochs, repeated tokens "
                f"improve the model less and less{forgotten}: shorten the stage, or mix in other data"
            )


def _no_replay(stage: StagePlan, by_name: Mapping[str, StagePlan]) -> Iterator[str]:
    if stage.partition is not None and stage.partition.trains_only_new_rows:
        return  # old text loses only the probability that new tokens get
    seen = {name for earlier in ancestors(stage, by_name) for name in earlier.datasets}
    new = [name for name in stage.datasets if name not in seen]
    if new and not any(use.replayed_tokens for use in stage.use_by_dataset.values()):
        yield (
            f"stages.{stage.name}: {', '.join(new)} is new to these weights and there is no replay, so much of the old "
            "data will be forgotten (in the paper the loss on the Pile rises by 0.27 nats after more English, by 1.39 "
            "after German): add replay = { fraction = 0.05 }, or 0.01 for similar data, 0.25 for a new language"
        )


def lr_changes(stage: StagePlan, *, peak: float, last_lr: float | None, earlier_peak: float | None) -> Iterator[str]:
    """Notes on the stage's LR, compared with that of the stages before, as far as it is known.

    Args:
        peak: highest LR of the stage and of those that continue its schedule.
        last_lr: LR of the last step before this stage; None if it is unknown.
        earlier_peak: highest LR of all stages before; None if it is unknown.
    """
    first = stage.lr_at(0)
    if last_lr is not None and first > _LR_JUMP * last_lr and stage.recipe.get("lr.warmup_until") == "0":
        yield (
            f"stages.{stage.name}.lr: begins at {first:.3g} without a warm-up, after an LR of {last_lr:.3g}: the loss "
            "will spike at first; warmup_until = 0.01 avoids that (the final loss is the same in the paper)"
        )
    if earlier_peak is None:
        return
    if peak > _EQUAL_LR * earlier_peak:
        yield (
            f"stages.{stage.name}.lr: its peak {peak:.3g} is above {earlier_peak:.3g}, the highest LR of these weights "
            "so far: adaptation is faster, more of the old data is forgotten, and training may become unstable"
        )
    if last_lr is not None and peak <= _EQUAL_LR * last_lr and last_lr < _DECAYED * earlier_peak:
        yield (
            f"stages.{stage.name}.lr: stays at or below {last_lr:.3g}, the decayed LR of the training before: little "
            f"is forgotten, and adaptation is slow; re-warm towards {earlier_peak:.3g} and decay again to adapt faster"
        )


def _thawed(stage: StagePlan, before: StagePlan) -> Iterator[str]:
    """A note on weights that were frozen in the stage before, and meet the full LR in the first step of this one."""
    if before.partition is None or stage.recipe.get("lr.warmup_until") != "0":
        return
    frozen = [name for name, parts in before.partition.parts.items() if not parts]
    if frozen and (stage.partition is None or any(stage.partition.parts[name] for name in frozen)):
        yield (
            f"stages.{stage.name}.lr: begins at {stage.lr_at(0):.3g} without a warm-up, and trains weights that "
            f"{before.name} left frozen, with new optimizer state: set warmup_until = 0.01"
        )


def _last_lr(checkpoint: StageCheckpoint, by_name: Mapping[str, StagePlan]) -> float:
    """The LR of the last step before a checkpoint."""
    return by_name[checkpoint.stage].lr_at(max(checkpoint.steps_done - 1, 0))
