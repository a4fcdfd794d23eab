"""Document mask and positions of a stage: its own keys replace those of [training]; and how far attention reaches."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from titan_cpt.config.schema import Config
from titan_cpt.config.stages import StageConfig
from titan_cpt.data.document_sample import DocumentSample
from titan_cpt.data.inventory import DataInventory
from titan_cpt.data.mixture import Tree, leaf_counts
from titan_cpt.models.spec import ModelSpec
from titan_cpt.planning.plan import StagePlan

_SHARE_BASE = 10**6  # sequences over which a mixture's shares are taken


def document_mask_of(config: Config, stage: StageConfig) -> bool:
    """Whether attention stays within a document in a stage."""
    return config.training.document_mask if stage.document_mask is None else stage.document_mask


def document_positions_of(config: Config, stage: StageConfig) -> bool:
    """Whether RoPE's positions begin at 0 in each document of a stage."""
    return config.training.document_positions if stage.document_positions is None else stage.document_positions


def document_recipe(config: Config, stage: StageConfig) -> dict[str, bool]:
    """What documents add to a stage's recipe: only what is true, so that older recipes stay as they are."""
    keys = {
        "document_mask": document_mask_of(config, stage),
        "document_positions": document_positions_of(config, stage),
    }
    return {key: value for key, value in keys.items() if value}


def attended_spans(inventory: DataInventory, spec: ModelSpec, tree: Tree, seq_len: int) -> tuple[float, ...]:
    """Mean number of positions that a token of a masked stage attends to in each layer, not halved for the causal mask.

    A source whose documents are not known counts with whole sequences: an upper bound.
    """
    counts = leaf_counts(tree, _SHARE_BASE)
    by_window = {}
    for window in {*spec.layer_windows}:
        total = Fraction(0)
        for leaf, count in counts.items():
            measured = inventory.documents.get((leaf.source, seq_len))
            total += count * Fraction(
                min(seq_len, window or seq_len) if measured is None else measured.mean_span(window)
            )
        by_window[window] = float(total / _SHARE_BASE)
    return tuple(by_window[window] for window in spec.layer_windows)


def document_notes(plan: StagePlan, inventory: DataInventory) -> Iterator[str]:
    """What the FLOPs of a masked stage rest on, and sources without documents."""
    if not plan.document_mask:
        return
    sources = sorted({source for source, _ in plan.source_numbers})
    known = {name: found for name in sources if (found := inventory.documents.get((name, plan.seq_len))) is not None}
    where = f"stages.{plan.name}.document_mask"
    if known and plan.attended_span is not None:
        samples = ", ".join(f"{_sample(found)} of {name}" for name, found in known.items())
        yield (
            f"{where}: a token attends to a document of {plan.attended_span:,.0f} tokens on average, which FLOPs and "
            f"MFU count (read: {samples})"
        )
    if unknown := [name for name in sources if name not in known]:
        yield (
            f"{where}: the documents of {', '.join(unknown)} are not known before training (no files, in object "
            "storage, or no tokenizer yet): FLOPs and MFU count whole sequences there, an upper bound"
        )
    for name, found in known.items():
        if found.lengths == (plan.seq_len,):
            yield (
                f"{where}: no document ends in {_sample(found)} of {name}: the mask has no effect there. Does the data "
                "have the tokenizer's end-of-document token after each document?"
            )


def _sample(found: DocumentSample) -> str:
    if found.sequences == found.available:
        return f"all {found.sequences:,} sequences"
    return f"{found.sequences:,} of {found.available:,} sequences"
