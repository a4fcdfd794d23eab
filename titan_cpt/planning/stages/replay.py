"""Replay: which earlier data a stage trains on again, with which weights, and whether there is enough of it.

data/mixture.py computes from these weights which sequence comes at which position of the stage.

Source: Ibrahim et al. 2024, arXiv:2403.08763, section 4.2: a fraction of each batch is drawn from earlier datasets; the
stage's token budget stays the same.
"""

from __future__ import annotations

from fractions import Fraction

from titan_cpt.config.stages import ReplayConfig, StageConfig
from titan_cpt.data.mixture import Leaf
from titan_cpt.planning.plan import StageCheckpoint, StagePlan, TrainingHistory, ancestors
from titan_cpt.planning.plan_draft import PlanDraft
from titan_cpt.planning.stages.mixture import normalized_weights, weighted_leaves


def replay_leaves(
    draft: PlanDraft, stage: StageConfig, history: TrainingHistory, init: StageCheckpoint | str
) -> dict[Leaf, Fraction]:
    """The sources of the stage's replay with their weights; empty without replay."""
    replay = stage.replay
    if replay is None or replay.fraction == 0:
        return {}
    _check_was_seen(draft, stage, replay, history, init)
    weights = _replay_weights(draft, stage, replay, history)
    return weighted_leaves(weights, draft.config.datasets, lambda source: _leaf(draft, replay, history, source))


def check_replay_lasts(draft: PlanDraft, plan: StagePlan, replay: ReplayConfig) -> None:
    """Compare the sequences that the stage replays with those that its weights have seen."""
    where = f"stages.{plan.name}.replay"
    for leaf, count in plan.leaf_counts().items():
        needed = leaf.first + count
        if not leaf.replayed or leaf.seen is None or needed <= leaf.seen:
            continue
        found = f"{needed} sequences of {leaf.source!r} would be replayed in total, and {leaf.seen} were trained on"
        if leaf.seen == 0:
            draft.problems.append(
                f"{where}: {found}; raise its weight or steps in that stage, or name other datasets in from"
            )
        elif replay.on_exhausted == "error":
            draft.problems.append(f'{where}: {found}; lower {where}.fraction or set on_exhausted = "repeat"')
        else:
            draft.notes.append(f'{where}: {found}; they repeat (on_exhausted = "repeat")')


def _leaf(draft: PlanDraft, replay: ReplayConfig, history: TrainingHistory, source: str) -> Leaf:
    key = f"{draft.config.job.seed}/replay/{source}" if replay.order == "reshuffled" else ""
    # A dataset that was never trained on in this run (a pretrained model's) counts as seen exactly once.
    seen = history.trained[source] if source in history.trained else draft.sequences.get(source)
    return Leaf(source, True, first=history.replayed.get(source, 0), seen=seen, reshuffle_key=key)


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
