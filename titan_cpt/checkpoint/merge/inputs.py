"""The models that a merge reads: a checkpoint's weights, their average, or a Hugging Face model; rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.averages import require_weights
from titan_cpt.checkpoint.checkpoint_spec import spec_of_checkpoint
from titan_cpt.checkpoint.hf_import import record_of_release
from titan_cpt.checkpoint.hf_release import ReleasedModel, open_released
from titan_cpt.checkpoint.merge.stored_weights import StoredWeights
from titan_cpt.checkpoint.provenance import tokenizer_path
from titan_cpt.checkpoint.tokenizer_check import tokenizer_of_release
from titan_cpt.common.reading import is_there
from titan_cpt.common.run_folder import MANIFEST_FILE
from titan_cpt.common.weights.named_weights import AVERAGE, MODEL, named_weights
from titan_cpt.models.spec import ModelSpec


@dataclass(frozen=True)
class MergeInput:
    """A model to merge.

    Attributes:
        name: as the user gave it.
        folder: of its files.
        spec: its architecture.
        record: the manifest; of a Hugging Face model, the one that an import would write.
        digest: SHA-256 over the names and checksums of its files.
        part: which of the checkpoint's weights are read: `MODEL` or `AVERAGE`.
        read: gives rows of a weight by its name, in the dtype of the files.
        tokenizer_path: its tokenizer, if it is on this machine.
        notes: for the user.
    """

    name: str
    folder: Path
    spec: ModelSpec
    record: Mapping[str, Any]
    digest: str
    part: str
    read: Callable[[str, slice], Tensor]
    tokenizer_path: str | None
    notes: tuple[str, ...] = ()


def open_input(name: str) -> MergeInput:
    """Open a model and check its files.

    Args:
        name: a checkpoint, with @average for the average in it, a folder of a Hugging Face model, or a hub name.

    Raises:
        CheckpointError: it is none of these, or damaged.
    """
    named = named_weights(name)
    folder = named.folder
    if is_there(folder / MANIFEST_FILE) or not (is_there(folder / "config.json") or _may_be_on_hub(name)):
        record = manifest.verify(folder)
        require_weights(named, record)
        spec = spec_of_checkpoint(record, folder)
        part = AVERAGE if named.average else MODEL
        read = StoredWeights(folder, spec, part).read
        digest = manifest.digest_of_files(record)
        return MergeInput(name, folder, spec, record, digest, part, read, tokenizer_path(record, folder))
    released = open_released(name)
    folder = released.files.folder
    tokenizer = tokenizer_of_release(folder)
    return MergeInput(
        name,
        folder,
        released.spec,
        record_of_release(released, released.spec, tokenizer),
        _digest(released),
        MODEL,
        _reader(released),
        str(folder) if tokenizer else None,
        tuple(f"{name}: {note}" for note in released.notes),
    )


def _may_be_on_hub(name: str) -> bool:
    """Whether a name has the form OWNER/NAME, and there is no folder of that name."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not is_there(Path(name))


def _reader(released: ReleasedModel) -> Callable[[str, slice], Tensor]:
    def read(name: str, rows: slice) -> Tensor:
        return released.read(name, released.spec, [rows])

    return read


def _digest(released: ReleasedModel) -> str:
    files = {
        path.name: {"bytes": path.stat().st_size, "xxh3_128": manifest.content_checksum(path)}
        for path in released.files.files
    }
    return manifest.digest_of_files({"files": files})
