"""The mixture of a stage: from datasets, weights and replay to the tree that gives the source of every sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from titan_cpt.config.datasets import DatasetConfig
from titan_cpt.config.stages import StageConfig
from titan_cpt.config.types import TokenMixture
from titan_cpt.data.mixture import Fork, Leaf, Tree, huffman_tree
from titan_cpt.planning.plan import TrainingHistory
from titan_cpt.planning.plan_draft import PlanDraft
from titan_cpt.planning.stages.own_batch import seq_len_of
from titan_cpt.planning.stages.token_weights import token_weights


def normalized_weights(names: Sequence[str] | Mapping[str, float]) -> dict[str, Fraction]:
    """Exact weights with sum 1, equal for a list of names; 0.1 counts as one tenth, as it was written."""
    weights = {name: Fraction(str(weight)) for name, weight in names.items()} if isinstance(names, Mapping) else {}
    weights = weights or dict.fromkeys(names, Fraction(1))
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def stage_weights(draft: PlanDraft, stage: StageConfig, sequences: int) -> dict[str, Fraction]:
    """Exact weights with sum 1 of the datasets whose data is new in the stage.

    Args:
        sequences: all sequences of the stage, replay included.
    """
    if isinstance(stage.dataset, TokenMixture):
        return token_weights(draft, stage, stage.dataset, sequences * (1 - replay_fraction(stage)))
    return normalized_weights(stage.dataset)


def replay_fraction(stage: StageConfig) -> Fraction:
    """The share of the stage's sequences that are replayed, as it was written."""
    return Fraction(str(stage.replay.fraction)) if stage.replay else Fraction(0)


def new_data_leaves(
    draft: PlanDraft, stage: StageConfig, history: TrainingHistory, weights: Mapping[str, Fraction]
) -> dict[Leaf, Fraction]:
    """The sources of the stage's new data with their weights; each continues where the weights' history ended."""
    seq_len = seq_len_of(draft.config, stage)
    return weighted_leaves(
        weights,
        draft.config.datasets,
        lambda source: Leaf(source, False, first=history.next_ordinal(source, seq_len)),
    )


def weighted_leaves(
    weights: Mapping[str, Fraction], datasets: Mapping[str, DatasetConfig], leaf_of: Callable[[str], Leaf]
) -> dict[Leaf, Fraction]:
    """The leaves of the datasets with their weights; a dataset's weight is divided among its domains.

    Args:
        leaf_of: makes the leaf of a source (`dataset` or `dataset.domain`).
    """
    leaves: dict[Leaf, Fraction] = {}
    for name in sorted(weights):
        for source, share in _domain_shares(name, datasets[name]).items():
            leaves[leaf_of(source)] = weights[name] * share
    return leaves


def mixture_tree(
    stage: StageConfig, new: Mapping[Leaf, Fraction], replay: Mapping[Leaf, Fraction]
) -> tuple[Tree, dict[str, Fraction]]:
    """The tree of a stage with `replay.fraction` of its sequences from replay, and every dataset's exact share."""
    fraction = replay_fraction(stage) if replay else Fraction(0)
    shares: dict[str, Fraction] = {}
    for leaves, part in ((replay, fraction), (new, 1 - fraction)):
        total = sum(leaves.values())
        for leaf, weight in leaves.items():
            name = leaf.source.partition(".")[0]
            shares[name] = shares.get(name, Fraction(0)) + part * weight / total
    tree = Fork(fraction, huffman_tree(replay), huffman_tree(new)) if replay else huffman_tree(new)
    return tree, shares


def _domain_shares(name: str, dataset: DatasetConfig) -> dict[str, Fraction]:
    if not dataset.domains:
        return {name: Fraction(1)}
    shares = normalized_weights({domain: table.weight for domain, table in dataset.domains.items()})
    return {f"{name}.{domain}": shares[domain] for domain in sorted(shares)}
