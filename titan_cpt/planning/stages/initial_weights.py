"""The initial weights of a stage, and their training history."""

from __future__ import annotations

from fractions import Fraction

from titan_cpt.config.stages import StageConfig
from titan_cpt.data.mixture import round_fraction
from titan_cpt.data.trained_text import Leg, with_leg
from titan_cpt.planning.plan import StageCheckpoint, TrainingHistory
from titan_cpt.planning.plan_draft import PlanDraft


def initial_weights(draft: PlanDraft, stage: StageConfig) -> StageCheckpoint | str:
    """The checkpoint of an earlier stage, or `random`, `checkpoint:PATH` or `hf:NAME`.

    `previous` is the end of the stage before, or the step before the annealing if its schedule is infinite. The
    config's check has already refused references to stages that do not exist.
    """
    earlier = list(draft.stages.values())
    init = stage.init or ("previous" if earlier else "random")
    if init == "previous":
        last = earlier[-1]
        infinite = next(s for s in draft.config.stages if s.name == last.name).lr.schedule.startswith("infinite")
        steps = last.steps if last.pre_anneal_step is None or not infinite else last.pre_anneal_step
        return StageCheckpoint(last.name, steps)
    if not init.startswith("stage:"):
        return init
    name, _, point = init.removeprefix("stage:").partition("@")
    base = draft.stages[name]
    if not point:
        return StageCheckpoint(name, base.steps)
    if base.pre_anneal_step is None:
        draft.problems.append(
            f"stages.{stage.name}.init: stage {name!r} has no annealing, so no pre-anneal point: write "
            f"stage:{name} for its end, or give it an infinite or wsd schedule"
        )
        return StageCheckpoint(name, base.steps)
    return StageCheckpoint(name, base.pre_anneal_step)


def history_of(draft: PlanDraft, init: StageCheckpoint | str) -> TrainingHistory:
    """The training history of the weights that a stage starts from; empty if no stage of this run trained them."""
    if isinstance(init, str):
        return TrainingHistory(0, {}, {}, {})
    stage = draft.stages[init.stage]
    trained = dict(stage.history.trained)
    replayed = dict(stage.history.replayed)
    for leaf, count in stage.leaf_counts(init.steps_done).items():
        if leaf.replayed:
            after = leaf.text.tokens_after(count) if leaf.text else (leaf.first + count) * stage.seq_len
            replayed[leaf.source] = after
        else:
            legs = trained.get(leaf.source, ())
            trained[leaf.source] = with_leg(legs, Leg(stage.seq_len, leaf.first, count))
    exposure = dict(stage.history.exposure)
    length = Fraction(stage.seq_len, draft.config.training.seq_len)
    sequences = stage.batch_sizes.sequences_before(init.steps_done) * length
    for name, share in stage.shares.items():
        exposure[name] = round_fraction(exposure.get(name, Fraction(0)) + share * sequences)
    return TrainingHistory(stage.history.steps + init.steps_done, trained, replayed, exposure)
