"""Merge models into a checkpoint, a block of rows at a time: no model is ever in memory as a whole."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.hf_import import require_free
from titan_cpt.checkpoint.merge.inputs import open_input
from titan_cpt.checkpoint.merge.merged_weights import BLOCK_ELEMENTS, MergedWeights
from titan_cpt.checkpoint.merge.parents import MERGE, merge_record, merged_recipe, require_agreement
from titan_cpt.checkpoint.merge.progress import merge_progress
from titan_cpt.checkpoint.merge.settings import MergeSettings
from titan_cpt.checkpoint.weights_only import record_without_training, save_weights
from titan_cpt.common.files import atomic_folder
from titan_cpt.models.registry import as_config_table


def merge(
    names: Sequence[str],
    out: Path,
    settings: MergeSettings,
    *,
    base: str | None = None,
    log: Callable[[str], None],
    block_elements: int = BLOCK_ELEMENTS,
) -> None:
    """Merge models and write the result as a checkpoint, as an import does.

    Args:
        names: checkpoints, folders of Hugging Face models, or hub names.
        out: the new checkpoint; must not exist, or be empty.
        settings: the method and its numbers, for these inputs.
        base: the model that task vectors are differences to; None for methods without them.
        log: called with each line to print.
        block_elements: elements of a weight that are read at a time, unless a row has more.

    Raises:
        CheckpointError: an input is missing or damaged, the inputs are of different models or tokenizers, a result is
            not a finite number, or `out` exists.
        OSError: `out` cannot be written.
    """
    require_free(out)
    inputs = [open_input(name) for name in names]
    base_input = None if base is None else open_input(base)
    everyone = [*inputs, *([base_input] if base_input else [])]
    notes = [*(note for one in everyone for note in one.notes), *require_agreement(everyone)]
    spec = inputs[0].spec
    log(f"{len(inputs)} inputs: {spec.family}, {spec.parameters:,} parameters")
    log(settings.describe())
    for note in notes:
        log(f"note: {note}")
    require_space(out, 4 * spec.parameters)
    weights = MergedWeights(inputs, base_input, settings, block_elements=block_elements)
    with atomic_folder(out) as partial, merge_progress(weights.total_elements) as weights.advance:
        weights.find_thresholds()
        checksums = save_weights(spec, weights.read, partial)
        record = record_without_training(manifest.MERGED, merged_recipe(inputs))
        manifest.write(partial, {**record, MERGE: merge_record(settings, inputs, base_input)}, checksums)
    table = "\n  ".join(as_config_table(spec).splitlines())
    log(f'{out}: written. To start a stage from it, set init = "checkpoint:{out}", and\n  {table}')


def require_space(out: Path, needed_bytes: int) -> None:
    """Check that the file system of an output has room for it.

    Raises:
        OSError: ENOSPC, with both sizes.
    """
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        reason = f"needs {needed_bytes / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free"
        raise OSError(errno.ENOSPC, reason, str(out))
