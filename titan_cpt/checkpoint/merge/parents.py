"""What is known of the models of a merge: their agreement, and what the merged checkpoint's manifest says of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint.checkpoint_spec import model_differences
from titan_cpt.checkpoint.merge.inputs import MergeInput
from titan_cpt.checkpoint.merge.settings import MergeSettings
from titan_cpt.checkpoint.provenance import (
    documents_begin_with_bos,
    find_base_model,
    max_sequence_length,
    tokenizer_mismatch,
    training_history,
)
from titan_cpt.checkpoint.tokenizer_check import TrainingTokenizer, tokenizer_of_manifest
from titan_cpt.data.tokenizer.ids_fingerprint import ids_fingerprint
from titan_cpt.data.tokenizer.tokenizer import BYTES
from titan_cpt.errors import CheckpointError, DataError

MERGE = "merge"
"""The entry of a merged checkpoint's manifest that this module writes."""


def require_agreement(inputs: Sequence[MergeInput]) -> Iterator[str]:
    """Check that the models have one architecture and one tokenizer.

    Yields:
        A note on each model whose tokenizer is unknown, and on the begin-of-document token where they differ in it.

    Raises:
        CheckpointError: they differ; the message lists every difference to the first model.
    """
    first = inputs[0]
    tokenizers = {one.name: known_tokenizer(one) for one in inputs}
    known = {name: tokenizer for name, tokenizer in tokenizers.items() if tokenizer is not None}
    lines: list[str] = []
    for other in inputs[1:]:
        changed = model_differences(first.spec.as_recipe(), other.spec.as_recipe())
        if other.name in known and not is_same_tokenizer(next(iter(known.values())), known[other.name]):
            shown = [f"{one.fingerprint[:12]} ({one.where})" for one in (next(iter(known.values())), known[other.name])]
            changed.append(f"tokenizer: {' -> '.join(shown)}")
        if changed:
            lines += [f"{first.name} -> {other.name}", *(f"  {line}" for line in changed)]
            lines += [f"  {line}" for line in _remedies(changed)]
    if lines:
        raise CheckpointError("\n  ".join(["merge: weights of different models cannot be merged:", *lines]))
    if known:
        unknown = [name for name, tokenizer in tokenizers.items() if tokenizer is None]
        yield from (f"{name}: its tokenizer is unknown; assuming that it is that of the others" for name in unknown)
    else:
        yield "the tokenizer of the inputs is unknown"
    begins = {one.name: _adds_bos(one) for one in inputs}
    if len({added for added in begins.values() if added is not None}) > 1:
        each = "; ".join(f"{name} {'yes' if added else 'no'}" for name, added in begins.items() if added is not None)
        yield f"the inputs differ in whether documents began with a begin-of-document token ({each}); the first counts"


def _remedies(changed: Sequence[str]) -> Iterator[str]:
    if all(line.startswith("model.vocab_size:") for line in changed):
        yield "`titan-cpt import NAME OUT --vocab-size ROWS` gives a release the number of rows of the other model"
    if any(line.startswith("tokenizer:") for line in changed):
        yield "the same ids mean other tokens"


def is_same_tokenizer(one: TrainingTokenizer, other: TrainingTokenizer) -> bool:
    """Whether two tokenizers are one file, or give the same ids."""
    return one.fingerprint == other.fingerprint or (one.ids is not None and one.ids == other.ids)


def known_tokenizer(one: MergeInput) -> TrainingTokenizer | None:
    """The tokenizer of a model, with the fingerprint of its ids if its file is still there; None if unknown."""
    tokenizer = tokenizer_of_manifest(one.record, one.folder)
    if tokenizer is None or tokenizer.ids is not None or not _has_file(one, tokenizer):
        return tokenizer
    assert one.tokenizer_path is not None, "it has the file"
    return TrainingTokenizer(tokenizer.where, tokenizer.fingerprint, ids_fingerprint(one.tokenizer_path))


def _has_file(one: MergeInput, tokenizer: TrainingTokenizer) -> bool:
    """Whether the file of a model's tokenizer is on this machine, and still that of the model."""
    try:
        return one.tokenizer_path is not None and tokenizer.is_that_of(one.tokenizer_path)
    except DataError:
        return False


def _adds_bos(one: MergeInput) -> bool | None:
    return documents_begin_with_bos(one.record, one.folder, one.tokenizer_path)


def merged_recipe(inputs: Sequence[MergeInput]) -> dict[str, Any]:
    """The recipe of the merged weights: the model, the longest sequence, and the first model's use of a BOS token."""
    lengths = [max_sequence_length(one.record, find_base_model(one.record)) for one in inputs]
    begins = {"tokenizer.add_bos": True} if _adds_bos(inputs[0]) else {}
    return {**inputs[0].spec.as_recipe(), "training.seq_len": max(lengths), **begins}


def merge_record(settings: MergeSettings, inputs: Sequence[MergeInput], base: MergeInput | None) -> dict[str, Any]:
    """The entry `merge` of the merged checkpoint's manifest."""
    everyone = [*inputs, *([base] if base else [])]
    tokenizers = [found for one in everyone if (found := known_tokenizer(one))]
    tokenizer = max(tokenizers, key=lambda found: found.ids is not None, default=None)
    paths = [one.tokenizer_path for one in everyone if tokenizer and _has_file(one, tokenizer)]
    bases = [model for one in everyone if (model := find_base_model(one.record))]
    configs = [dict(model.config) for model in bases]
    return {
        **settings.as_record(),
        "parents": [parent_record(one) for one in inputs],
        **({"base": parent_record(base)} if base else {}),
        **({"tokenizer": tokenizer.as_record()} if tokenizer else {}),
        **({"tokenizer_path": _absolute(paths[0])} if paths else {}),
        "base_models": list(dict.fromkeys(name for model in bases for name in (model.name, *model.others))),
        "base_config": configs[0] if configs and all(config == configs[0] for config in configs) else {},
    }


def _absolute(path: str | None) -> str | None:
    return path if path in (BYTES, None) else str(Path(path).absolute())


def parent_record(one: MergeInput) -> dict[str, Any]:
    """What a manifest says of one model of a merge."""
    record = one.record
    base_model = find_base_model(record)
    tokenizer = known_tokenizer(one)
    kept = ("kind", "stage", "steps_done", "run_step", "fingerprint", MERGE)
    return {
        "path": one.name,
        "digest": one.digest,
        "weights": one.part,
        **{key: record[key] for key in kept if key in record},
        "history": [
            {"name": stage.name, "steps": stage.steps, "init": stage.init} for stage in training_history(record)
        ],
        "base_model": base_model.name if base_model else None,
        "max_sequence_length": max_sequence_length(record, base_model),
        "tokenizer": tokenizer.as_record() if tokenizer else None,
        "tokenizer_mismatch": tokenizer_mismatch(record, one.folder),
    }
