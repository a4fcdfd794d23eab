"""The initial weights of a stage, and their training history."""

from __future__ import annotations

from fractions import Fraction

from titan_cpt.common.weights.named_weights import split_average, suffix_of
from titan_cpt.config.stages import StageConfig
from titan_cpt.data.mixture import round_fraction
from titan_cpt.data.trained_text import Leg, with_leg
from titan_cpt.planning.plan import StageCheckpoint, TrainingHistory
from titan_cpt.planning.plan_draft import PlanDraft


def initial_weights(draft: PlanDraft, stage: StageConfig) -> StageCheckpoint | str:
    """The checkpoint of an earlier stage, or `random`, `checkpoint:PATH` or `hf:NAME`.

    `previous` is the end of the stage before, or the step before the annealing if its schedule is infinite, except in a
    stage that continues this schedule. The config's check has already refused references to stages that do not exist.
    """
    earlier = list(draft.stages.values())
    init = stage.init or ("previous" if earlier else "random")
    if init == "previous":
        continues = draft.spans[stage.name].first.name != stage.name
        return StageCheckpoint(earlier[-1].name, earlier[-1].steps) if continues else _previous(draft, stage)
    if not init.startswith("stage:"):
        return init
    named, average = split_average(init.removeprefix("stage:"))
    name, _, point = named.partition("@")
    base = draft.stages[name]
    if point and base.pre_anneal_step is None:
        _refuse_pre_anneal(draft, stage, name)
    if average and not point and base.pre_anneal_step is not None:
        draft.notes.append(
            f"stages.{stage.name}.init: {init} is of the annealed end of {name!r}; its average at the pre-anneal "
            f"point, which imitates an annealing instead, is stage:{name}@pre_anneal{suffix_of(average)}"
        )
    steps_done = base.pre_anneal_step if point and base.pre_anneal_step is not None else base.steps
    return StageCheckpoint(name, steps_done, average)


def _previous(draft: PlanDraft, stage: StageConfig) -> StageCheckpoint:
    """The checkpoint from which the next stage with a schedule of its own starts."""
    last = list(draft.stages)[-1]
    if not draft.spans[last].first.lr.schedule.startswith("infinite"):
        return StageCheckpoint(last, draft.stages[last].steps)
    annealing = _pre_anneal(draft, last)
    if annealing is None:
        return StageCheckpoint(last, draft.stages[last].steps)
    if annealing.stage != last:
        draft.notes.append(
            f"stages.{stage.name}: starts from the step before the annealing, which is in stage {annealing.stage!r}: "
            f'its weights lack the stages after it; init = "stage:{last}" starts from the end instead'
        )
    return annealing


def _pre_anneal(draft: PlanDraft, name: str) -> StageCheckpoint | None:
    """The pre-anneal point of the schedule that spans a stage, in whichever of its stages it is."""
    spanned = [draft.stages[each] for each in draft.spans[name].names if each in draft.stages]
    points = [StageCheckpoint(each.name, each.pre_anneal_step) for each in spanned if each.pre_anneal_step is not None]
    return points[0] if points else None


def _refuse_pre_anneal(draft: PlanDraft, stage: StageConfig, name: str) -> None:
    where = f"stages.{stage.name}.init"
    annealing = _pre_anneal(draft, name)
    if annealing is None:
        draft.problems.append(
            f"{where}: stage {name!r} has no annealing, so no pre-anneal point: write stage:{name} for its end, or "
            "give it an infinite or wsd schedule"
        )
    else:
        draft.problems.append(
            f"{where}: the annealing of its schedule begins in stage {annealing.stage!r}, not in {name!r}: write "
            f"stage:{annealing.stage}@pre_anneal, or stage:{name} for the end of {name!r}"
        )


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
