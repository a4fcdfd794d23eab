"""Replay: which earlier data a stage trains on again, with which weights, and whether there is enough of it.

data/mixture.py computes from these weights which sequence comes at which position of the stage.

Source: Ibrahim et al. 2024, arXiv:2403.08763, section 4.2: a fraction of each batch is drawn from earlier datasets; the
stage's token budget stays the same.
"""

from __future__ import annotations

from fractions import Fraction

from titan_cpt.config.stages import ReplayConfig, StageConfig
from titan_cpt.data.mixture import Leaf
from titan_cpt.data.trained_text import Leg, ReplayedText
from titan_cpt.planning.plan import StageCheckpoint, StagePlan, TrainingHistory, ancestors
from titan_cpt.planning.plan_draft import PlanDraft
from titan_cpt.planning.stages.mixture import normalized_weights, weighted_leaves
from titan_cpt.planning.stages.own_batch import seq_len_of


def replay_leaves(
    draft: PlanDraft, stage: StageConfig, history: TrainingHistory, init: StageCheckpoint | str
) -> dict[Leaf, Fraction]:
    """The sources of the stage's replay with their weights; empty without replay."""
    replay = stage.replay
    if replay is None or replay.fraction == 0:
        return {}
    _check_was_seen(draft, stage, replay, history, init)
    weights = _replay_weights(draft, stage, replay, history)
    return weighted_leaves(weights, draft.config.datasets, lambda source: _leaf(draft, stage, replay, history, source))


def check_replay_lasts(draft: PlanDraft, plan: StagePlan, replay: ReplayConfig) -> None:
    """Compare what the stage replays with what its weights have seen."""
    where = f"stages.{plan.name}.replay"
    for leaf, count in plan.leaf_counts().items():
        if not leaf.replayed:
            continue
        if leaf.text is not None:
            needed, seen, unit = leaf.text.tokens_after(count), leaf.text.tokens, "tokens"
        elif leaf.seen is not None:
            needed, seen, unit = leaf.first + count, leaf.seen, "sequences"
        else:
            continue
        if needed <= seen:
            continue
        found = f"{needed} {unit} of {leaf.source!r} would be replayed in total, and {seen} were trained on"
        if seen == 0:
            draft.problems.append(
                f"{where}: {found}; raise its weight or steps in that stage, or name other datasets in from"
            )
        elif replay.on_exhausted == "error":
            draft.problems.append(f'{where}: {found}; lower {where}.fraction or set on_exhausted = "repeat"')
        else:
            draft.notes.append(f'{where}: {found}; they repeat (on_exhausted = "repeat")')


def replay_leaf(
    source: str, legs: tuple[Leg, ...] | None, *, seq_len: int, first_token: int, reshuffle_key: str
) -> Leaf:
    """The leaf of a source that is replayed in sequences of `seq_len` tokens.

    Args:
        legs: what was trained on; None if that is not known yet.
        first_token: the position in the trained text at which the replay continues.
    """
    is_usual = legs is None or all(leg.seq_len == seq_len for leg in legs)
    if legs and not (is_usual and len(legs) == 1 and legs[0].first == 0 and first_token % seq_len == 0):
        return Leaf(source, True, text=ReplayedText(legs, seq_len, first_token, reshuffle_key))
    seen = None if legs is None else sum(leg.count for leg in legs)
    return Leaf(source, True, first=-(-first_token // seq_len), seen=seen, reshuffle_key=reshuffle_key)


def _leaf(draft: PlanDraft, stage: StageConfig, replay: ReplayConfig, history: TrainingHistory, source: str) -> Leaf:
    seq_len = seq_len_of(draft.config, stage)
    first = history.replayed.get(source, 0)
    legs = history.trained.get(source)
    if legs is None:  # never trained on in this run (a pretrained model's dataset): it counts as seen exactly once
        count = draft.sequences.get((source, seq_len))
        legs = None if count is None else (Leg(seq_len, 0, count),)
        first = -(-first // seq_len) * seq_len
    key = f"{draft.config.job.seed}/replay/{source}" if replay.order == "reshuffled" else ""
    return replay_leaf(source, legs, seq_len=seq_len, first_token=first, reshuffle_key=key)


def _replay_weights(
    draft: PlanDraft, stage: StageConfig, replay: ReplayConfig, history: TrainingHistory
) -> dict[str, Fraction]:
    """Relative weights of the replayed datasets; without given weights, the sequences trained on, replay included."""
    names = replay.from_
    where = f"stages.{stage.name}.replay.from"
    if isinstance(names, dict):
        return normalized_weights(names)
    if names is None:
        weights = {name: seen for name, seen in history.exposure.items() if seen and name not in stage.dataset}
        if not weights:
            draft.problems.append(
                f"{where}: these weights have not been trained on other data yet, so there is nothing to replay: "
                "remove replay, or name datasets here"
            )
        return weights
    weights = {name: history.exposure.get(name, Fraction(0)) for name in names}
    if len(names) == 1:
        return {names[0]: Fraction(1)}
    unseen = [name for name, weight in weights.items() if not weight]
    if unseen:
        draft.problems.append(
            f"{where}: {unseen[0]!r} was not trained on in this run, so its share of the replay is unknown: "
            f"give weights, such as {{ {', '.join(f'{name} = 1.0' for name in names)} }}"
        )
        return {}
    return weights


def _check_was_seen(
    draft: PlanDraft,
    stage: StageConfig,
    replay: ReplayConfig,
    history: TrainingHistory,
    init: StageCheckpoint | str,
) -> None:
    """Refuse replay of data that weights trained from scratch see in a later stage first; note other unseen data."""
    if isinstance(init, StageCheckpoint):
        parent = draft.stages[init.stage]
        init = [parent, *ancestors(parent, draft.stages)][-1].init
    if init != "random":
        return  # a pretrained model may have been trained on anything
    names = [each.name for each in draft.config.stages]
    later = {name: each.name for each in draft.config.stages[names.index(stage.name) :] for name in each.dataset}
    where = f"stages.{stage.name}.replay.from"
    for name in replay.from_ or ():
        if history.exposure.get(name) or name in stage.dataset:
            continue
        if name in later:
            draft.problems.append(
                f"{where}: {name!r} was not seen before this stage: these weights were trained from scratch, and the "
                f"first stage that trains on it is {later[name]!r}; replay seen datasets, or make it part of dataset"
            )
        else:
            draft.notes.append(f"{where}: {name!r} was never trained on by these weights: it is new data, not replay")
