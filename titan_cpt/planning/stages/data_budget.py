"""How many sequences every source has, and how many sequences, tokens and epochs a stage takes from each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

from titan_cpt.common.batch_sizes import BatchSizes
from titan_cpt.config.schema import Config
from titan_cpt.config.stages import StageConfig
from titan_cpt.data.inventory import DataInventory
from titan_cpt.data.mixture import Leaf
from titan_cpt.data.sequence_lengths import sequence_lengths
from titan_cpt.data.trained_text import Leg, trained_tokens
from titan_cpt.planning.plan import DatasetUse, StagePlan
from titan_cpt.planning.plan_draft import PlanDraft


def stage_steps(stage: StageConfig, batch_sizes: BatchSizes, *, seq_len: int) -> int:
    """The optimizer steps of a stage; a token budget is rounded up to whole steps."""
    return stage.steps or math.ceil(batch_sizes.step_at(Fraction(stage.tokens or 0, seq_len)))


def count_sequences(config: Config, inventory: DataInventory, problems: list[str]) -> dict[tuple[str, int], int | None]:
    """The number of sequences of every training source in every length that the run draws from it.

    None for sources without files and those that are too short. A stream of N tokens has (N - 1) // seq_len sequences:
    the last target of a sequence is the next one's first input. Sources with a stored order have the sequences of that
    order, sources that pack documents the packed ones.

    Args:
        problems: sources, of training and validation, that are shorter than one sequence are appended here.
    """
    lengths = sequence_lengths(config)
    sequences: dict[tuple[str, int], int | None] = {}
    for source, tokens in inventory.tokens.items():
        for seq_len, key in lengths[source.partition(".")[0]].items():
            stored = inventory.sequences.get((source, seq_len))
            packed = inventory.packing.get((source, seq_len))
            if packed and packed.tokens >= seq_len:
                stored = packed.sequences
            sequences[source, seq_len] = stored or None
            if sequences[source, seq_len] or tokens is None:
                continue
            if packed or tokens <= seq_len:
                length = f"{seq_len}" if packed else f"{seq_len} + 1"
                problems.append(
                    f"{_table(source)}.train: {tokens} tokens are fewer than one sequence of {length}; add tokens, or "
                    f"lower {key}"
                )
            else:
                sequences[source, seq_len] = (tokens - 1) // seq_len
    seq_len = config.training.seq_len
    for source, tokens in inventory.validation_tokens.items():
        if tokens is not None and tokens <= seq_len:
            problems.append(
                f"{_table(source)}.validation: {tokens} tokens are fewer than one sequence of {seq_len} + 1; "
                "add tokens, or remove the key"
            )
    return sequences


def dataset_use(
    draft: PlanDraft, counts: Mapping[Leaf, int], *, seq_len: int, by_source: bool
) -> dict[str, DatasetUse]:
    """What a stage takes from every dataset, or from every source (`dataset` or `dataset.domain`) with `by_source`.

    Args:
        counts: number of sequences of every leaf in the stage.
        seq_len: tokens of a sequence.
    """

    def name_of(source: str) -> str:
        return source if by_source else source.partition(".")[0]

    new: dict[str, int] = {}
    replayed: dict[str, int] = {}
    for leaf, count in counts.items():
        used = replayed if leaf.replayed else new
        name = name_of(leaf.source)
        used[name] = used.get(name, 0) + count * seq_len
    sizes: dict[str, int | None] = {}
    for source, tokens in draft.inventory.tokens.items():
        if packed := draft.inventory.packing.get((source, seq_len)):
            tokens = packed.sequences * seq_len  # with padding, which counts as tokens of the stage
        so_far = sizes.get(name_of(source), 0)
        sizes[name_of(source)] = None if tokens is None or so_far is None else so_far + tokens
    use = {}
    for name in sorted({*new, *replayed}):
        tokens = new.get(name, 0) + replayed.get(name, 0)
        size = sizes.get(name)
        use[name] = DatasetUse(tokens, replayed.get(name, 0), tokens / size if size else None)
    return use


def stored_order_notes(stage: StagePlan, stored_sequences: Mapping[tuple[str, int], int]) -> list[str]:
    """A note for every source whose stored order ends before the stage does, and is then repeated.

    Args:
        stored_sequences: length of the stored order by source and sequence length, of the sources that have one.
    """
    notes = []
    for leaf, count in stage.leaf_counts().items():
        length = stored_sequences.get((leaf.source, stage.seq_len), 0)
        if not leaf.replayed and leaf.first < length < leaf.first + count:
            notes.append(
                f"stages.{stage.name}: the stored order of {leaf.source} has {length} sequences, and "
                f"{leaf.first + count} are needed: it is repeated from its beginning"
            )
    return notes


def other_order_notes(draft: PlanDraft, stage: StagePlan) -> Iterator[str]:
    """A note for every source of new data that was trained on in sequences of another length.

    Sequences of each length have a permutation of their own: a part of the text comes a second time in an epoch.
    """
    for leaf, count in stage.leaf_counts().items():
        legs = stage.history.trained.get(leaf.source, ())
        other = sorted({leg.seq_len for leg in legs} - {stage.seq_len})
        if leaf.replayed or not count or not other or _in_stored_order(draft.config, leaf.source):
            continue
        sequences = draft.sequences.get((leaf.source, stage.seq_len))
        share = "some" if sequences is None else _seen_before(leaf, legs, sequences, stage.seq_len)
        if share:
            yield (
                f"stages.{stage.name}: {leaf.source} was trained on in sequences of {' and '.join(map(str, other))} "
                f"tokens, and those of {stage.seq_len} come in another order: {share} of its new tokens were trained "
                "on before in this epoch"
            )


def _seen_before(leaf: Leaf, legs: Sequence[Leg], sequences: int, seq_len: int) -> str:
    """The share of an epoch that was trained on in sequences of other lengths, in words; empty for none."""
    epoch = leaf.first // sequences * sequences  # its first ordinal
    same = sum(max(0, leg.first + leg.count - max(leg.first, epoch)) for leg in legs if leg.seq_len == seq_len)
    seen = trained_tokens(legs) - (epoch + same) * seq_len
    return f"about {seen / (sequences * seq_len):.1%}" if seen > 0 else ""


def _in_stored_order(config: Config, source: str) -> bool:
    name, _, domain = source.partition(".")
    table = config.datasets[name]
    return (table.domains[domain] if domain else table).in_stored_order


def _table(source: str) -> str:
    return f"datasets.{source.replace('.', '.domains.')}"
