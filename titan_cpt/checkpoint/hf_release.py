"""A Hugging Face model ("release"): its config.json as a ModelSpec, its weights checked and readable by slices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from titan_cpt.checkpoint.hf_config import read_config
from titan_cpt.checkpoint.hf_files import WeightFiles, released_folder
from titan_cpt.common.text import problem_list
from titan_cpt.errors import CheckpointError
from titan_cpt.models.build import build_model
from titan_cpt.models.huggingface_config import TEXT_PART_OF, TEXT_PREFIX, spec_from_config
from titan_cpt.models.huggingface_weights import VOCABULARY_WEIGHTS, foreign_and_missing, hub_names
from titan_cpt.models.spec import ModelSpec


@dataclass(frozen=True)
class ReleasedModel:
    """A Hugging Face model whose weight files match its config.json.

    Attributes:
        name: as the user gave it.
        config: its config.json; of a multimodal model, that of its text part.
        spec: its architecture; `resized` changes only the vocabulary size.
        files: its weight files.
        notes: on files in its folder, and weights in these, that were ignored.
    """

    name: str
    config: dict[str, Any]
    spec: ModelSpec
    files: WeightFiles
    notes: tuple[str, ...] = ()

    def resized(self, vocab_size: int | None) -> ModelSpec:
        """The model's spec, with another vocabulary size if one is given."""
        return self.spec if vocab_size is None else replace(self.spec, vocab_size=vocab_size)

    def read(self, name: str, spec: ModelSpec, slices: Sequence[slice] = (), *, finite: bool = True) -> Tensor:
        """A weight by its name in titan_cpt, or a slice, in the file's dtype; vocabulary weights resized to `spec`.

        Args:
            finite: whether to require that all values are finite.

        Raises:
            CheckpointError: the file can no longer be read, or the weight has integers, NaN or infinite values.
        """
        hub_name = hub_names(spec)[name]
        if name in VOCABULARY_WEIGHTS:
            weight = self.files.read_rows(hub_name, spec.vocab_size, slices)
        else:
            weight = self.files.read(hub_name, slices)
        self._require_floats(hub_name, weight)
        wide = weight.float() if weight.itemsize == 1 else weight  # torch has no aminmax for float8
        if finite and wide.numel() and not all(map(math.isfinite, torch.aminmax(wide))):
            raise CheckpointError(
                f"{self.name}: {hub_name} has values that are NaN or infinite, so it cannot be trained on. Download "
                "the files again, or use an earlier checkpoint"
            )
        return weight

    def read_file_rows(self, name: str, rows: slice) -> Tensor:
        """Rows of a weight as they are in the file, which may be NaN or infinite, by its name in titan_cpt.

        Raises:
            CheckpointError: the file can no longer be read, or the weight has integers.
        """
        hub_name = hub_names(self.spec)[name]
        weight = self.files.read(hub_name, (rows,))
        self._require_floats(hub_name, weight)
        return weight

    def _require_floats(self, hub_name: str, weight: Tensor) -> None:
        if not weight.is_floating_point():
            raise CheckpointError(
                f"{self.name}: {hub_name} has the dtype {str(weight.dtype).removeprefix('torch.')}: quantized weights "
                "cannot be trained on; use the unquantized model"
            )

    def describe(self, spec: ModelSpec) -> str:
        """The model's name, and how its vocabulary is resized, for messages."""
        old = self.spec.vocab_size
        new = spec.vocab_size
        if new < old:
            return f"{self.name}, vocabulary {old:,} -> {new:,} rows: rows from {new:,} on dropped"
        grown = f", vocabulary {old:,} -> {new:,} rows: new rows are the mean of the old" if new > old else ""
        return f"{self.name}{grown}"


def open_released(name: str, *, compare_sets: bool = True) -> ReleasedModel:
    """Open a Hugging Face model and check that its weight files match its config.json.

    Args:
        name: a folder or a hub name.
        compare_sets: if the folder holds several complete sets of weights, read them all and raise if they differ.

    Raises:
        CheckpointError: it is missing or damaged, its architecture is not supported, its weights do not match its
            config.json, or it holds two sets of weights that differ.
    """
    folder = released_folder(name)
    config = read_config(folder)
    spec = spec_from_config(config, str(folder / "config.json"))
    files = WeightFiles(folder, prefix=TEXT_PREFIX if TEXT_PART_OF in config else "")
    foreign, missing = foreign_and_missing(files.shapes, spec)
    faults = [f"{hub_name}: missing" for hub_name in missing]
    faults += [f"{hub_name}: not a weight of the model that config.json describes" for hub_name in foreign]
    if not missing:  # otherwise config.json may describe a model that cannot be built
        faults += _wrong_shapes(files, spec)
    if faults:
        raise CheckpointError(f"{folder}: the weights do not fit config.json: {problem_list(faults)}")
    _require_the_tied_head(files, spec)
    notes = [*_other_sets(files, spec), *files.unread()] if compare_sets else []
    if files.other_parts:
        parts = ", ".join(dict.fromkeys(each.partition(".")[0] for each in files.other_parts))
        notes.append(f"only its text model is used: {len(files.other_parts)} weights of {parts} were ignored")
    return ReleasedModel(name, config, spec, files, tuple(notes))


def _wrong_shapes(files: WeightFiles, spec: ModelSpec) -> Iterator[str]:
    names = hub_names(spec)
    for name, expected in weight_shapes(spec).items():
        shape = files.shapes.get(names[name], expected)
        if shape != expected:
            yield f"{names[name]}: has shape {list(shape)}, but config.json requires {list(expected)}"


def _require_the_tied_head(files: WeightFiles, spec: ModelSpec) -> None:
    """Raise CheckpointError if a model with tied embeddings has a separate head: one of the two would be lost."""
    head = "lm_head.weight"
    embedding = hub_names(spec)["embedding.weight"]
    if not spec.tied or head not in files.shapes:
        return
    if files.shapes[head] != files.shapes[embedding] or not torch.equal(files.read(head), files.read(embedding)):
        raise CheckpointError(
            f"{files.folder}: config.json has tie_word_embeddings = true, but {head} differs from {embedding}: "
            "transformers 4 computes with the embedding only, 5 with both. Set it to false if the head was "
            f"trained, or remove {head} if it was not"
        )


def _other_sets(files: WeightFiles, spec: ModelSpec) -> Iterator[str]:
    """A note on each further set of weights in the folder.

    Raises:
        CheckpointError: a set is complete and holds other weights.
    """
    for entry in files.other_entries:
        try:
            other = WeightFiles(files.folder, entry, prefix=files.prefix)
        except CheckpointError:
            yield f"{entry.name} was ignored, as it is incomplete; {files.entry.name} was read"
            continue
        names = list(hub_names(spec).values())
        if any(name not in other.shapes for name in names):
            yield f"{entry.name} was ignored, as weights are missing in it; {files.entry.name} was read"
        elif (different := files.first_difference(other, names)) is not None:
            raise CheckpointError(
                f"{files.folder}: {files.entry.name} and {entry.name} are two complete sets of weights that differ, "
                f"for example in {different}; transformers would read {files.entry.name}. Remove the wrong one"
            )
        else:
            yield f"{entry.name} was ignored, as its weights are the same; {files.entry.name} was read"


def weight_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Our name of every weight of the model -> its shape."""
    with torch.device("meta"):
        model = build_model(spec)
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
