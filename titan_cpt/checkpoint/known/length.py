"""The longest sequence that weights from outside of a run know, for the plan's notes. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.hf_config import read_config
from titan_cpt.checkpoint.provenance import find_base_model, max_sequence_length
from titan_cpt.checkpoint.tokenizer_check import CHECKPOINT_PREFIX, HUB_PREFIX
from titan_cpt.common.run_folder import MANIFEST_FILE
from titan_cpt.common.weights.named_weights import named_weights
from titan_cpt.errors import AccessError, CheckpointError
from titan_cpt.models.releases import release_of_hub_name
from titan_cpt.planning.plan import StagePlan
from titan_cpt.planning.stages.context_notes import context_notes
from titan_cpt.planning.stages.release_notes import ReleasedWeights


def length_notes(stages: Sequence[StagePlan]) -> Iterator[str]:
    """`context_notes` of stages that train weights from outside of the run, as far as that is known."""
    inits = {stage.init for stage in stages if isinstance(stage.init, str)}
    known = {init: length for init in sorted(inits) if (length := _known_length(init)) is not None}
    yield from context_notes(stages, known)


def _known_length(init: str) -> int | None:
    """max_position_embeddings of a release in a folder, or the longest sequence that trained a checkpoint.

    Of a release on the hub, the length of the sequences that last trained it, if that is published.
    """
    folder = Path(init.partition(":")[2])
    checkpoint = named_weights(folder).folder
    if init.startswith(HUB_PREFIX) and not folder.is_dir():
        name, _, revision = init.removeprefix(HUB_PREFIX).partition("@")
        release = release_of_hub_name(name)
        return None if release is None else ReleasedWeights(name, release, revision or "main").seq_len
    try:
        if init.startswith(HUB_PREFIX):
            length = read_config(folder).get("max_position_embeddings")
            return length if isinstance(length, int) and length > 0 else None
        if init.startswith(CHECKPOINT_PREFIX) and (checkpoint / MANIFEST_FILE).is_file():
            record = manifest.read(checkpoint)
            return max_sequence_length(record, find_base_model(record))
    except (CheckpointError, AccessError):
        pass  # reported when the stage begins
    return None
