"""Checkpoint conversion from other trainers: weights and AdamW's state, one tensor after another, as a checkpoint.

A stage starts from the result with `init = "checkpoint:OUT"` and, if it has AdamW's state, `optimizer_state = "keep"`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.hf_import import require_free
from titan_cpt.checkpoint.hf_release import weight_shapes
from titan_cpt.checkpoint.other_trainers.litgpt.reader import open_litgpt
from titan_cpt.checkpoint.other_trainers.megatron import open_megatron
from titan_cpt.checkpoint.other_trainers.neox import open_neox
from titan_cpt.checkpoint.other_trainers.olmo_core.reader import open_olmo_core
from titan_cpt.checkpoint.other_trainers.torchtitan.reader import open_torchtitan
from titan_cpt.checkpoint.other_trainers.trained_checkpoint import (
    MOMENTS,
    AdamWState,
    ImportRequest,
    StoredTensor,
    TrainedCheckpoint,
)
from titan_cpt.checkpoint.tokenizer_check import TrainingTokenizer
from titan_cpt.checkpoint.weights_only import record_without_training, save_tensors
from titan_cpt.common.files import atomic_folder
from titan_cpt.common.reading import is_there, matching
from titan_cpt.common.run_folder import MANIFEST_FILE
from titan_cpt.common.text import problem_list
from titan_cpt.data.tokenizer.ids_fingerprint import ids_fingerprint
from titan_cpt.data.tokenizer.tokenizer import fingerprint_of
from titan_cpt.errors import CheckpointError
from titan_cpt.models.registry import as_config_table

READERS: Mapping[str, Callable[[ImportRequest], TrainedCheckpoint]] = {
    "torchtitan": open_torchtitan,
    "megatron": open_megatron,
    "neox": open_neox,
    "litgpt": open_litgpt,
    "olmo-core": open_olmo_core,
}
"""Name of a trainer, as `titan-cpt import --from` takes it -> what opens its checkpoints."""
_DAMAGE = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
_LARGEST_STEP = 1 << 24  # float32, which AdamW counts in, has all whole numbers up to here


def import_from_trainer(
    trainer: str, request: ImportRequest, out: Path, *, tokenizer: str | None = None, log: Callable[[str], None]
) -> None:
    """Convert a checkpoint of another trainer.

    Args:
        trainer: a key of `READERS`.
        request: the checkpoint, and what the user says of it.
        out: the checkpoint's folder; must not exist, or be empty.
        tokenizer: "bytes", or the tokenizer.json that the weights were trained with, or its folder; None: unknown.
        log: called with each line to print.

    Raises:
        CheckpointError: the checkpoint cannot be read or does not fit its model, or `out` exists.
        ConfigError: the model's config cannot be read, or describes a model that is not available here.
        DataError: the tokenizer cannot be read.
        OSError: `out` cannot be written.
    """
    require_free(out)
    _require_foreign(request.path, out)
    trained_with = None
    if tokenizer is not None:
        trained_with = TrainingTokenizer(tokenizer, fingerprint_of(tokenizer), ids_fingerprint(tokenizer))
    with _damage_reported(str(request.path)):
        source = READERS[trainer](request)
    write_checkpoint(source, str(request.path), out, tokenizer=trained_with, log=log)


def _require_foreign(path: Path, out: Path) -> None:
    """Raise CheckpointError for a checkpoint of titan_cpt, or a model of Hugging Face: neither is another trainer's."""
    if is_there(path / MANIFEST_FILE):
        raise CheckpointError(f'{path}: is a checkpoint of titan_cpt; a stage starts from it with "checkpoint:{path}"')
    if is_there(path / "config.json") and matching(path, "*.safetensors") and not matching(path, "*.pth"):
        raise CheckpointError(
            f"{path}: is a Hugging Face model, which `titan-cpt import {path} {out}`, without --from, imports"
        )


@contextmanager
def _damage_reported(where: str) -> Iterator[None]:
    """Translate whatever reading a damaged file raises: its content can be anything, where a reader expects numbers."""
    try:
        yield
    except _DAMAGE as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{where}: cannot be read: {type(error).__name__}: {reason}. Copy the checkpoint again, or import with "
            "--weights-only if only the optimizer state is damaged"
        ) from error


def write_checkpoint(
    source: TrainedCheckpoint,
    name: str,
    out: Path,
    *,
    tokenizer: TrainingTokenizer | None = None,
    log: Callable[[str], None],
) -> None:
    """Write what a reader found as a checkpoint, in float32, and print what it is; nothing stays if that fails.

    Args:
        name: of the other trainer's checkpoint, for messages and for the manifest.
        tokenizer: that of the weights; None: unknown.

    Raises:
        CheckpointError: weights or moments are missing, foreign, of a wrong shape or dtype, or not finite.
        OSError: `out` cannot be written.
    """
    shapes = weight_shapes(source.spec)
    _require_fit(source, name, shapes)
    tensors = {f"model.{weight}": stored for weight, stored in source.weights.items()}
    for weight, state in source.optimizer.items():
        tensors |= {f"optimizer.state.{weight}.{moment}": getattr(state, moment) for moment in MOMENTS}
    steps = {f"optimizer.state.{weight}.step": state.step for weight, state in source.optimizer.items()}
    sizes: dict[str, tuple[int, ...]] = {key: stored.shape for key, stored in tensors.items()}
    log(f"{name}: {source.trainer}, {source.spec.family}, {source.spec.parameters:,} parameters")

    def read(key: str) -> Tensor:
        if key in steps:
            return torch.tensor(float(steps[key]))
        return _checked(tensors[key], name, negative=not key.endswith(MOMENTS[1]))

    with atomic_folder(out) as partial:
        checksums = save_tensors(sizes | dict.fromkeys(steps, ()), read, partial)
        manifest.write(partial, _record(source, name, tokenizer), checksums)
    for line in _report(source, out, tokenizer):
        log(line)


def _require_fit(source: TrainedCheckpoint, name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check the names and shapes of all tensors before anything is written."""
    faults = [f"{weight}: missing" for weight in shapes if weight not in source.weights]
    faults += [f"{where}: not a weight of this model" for where in source.foreign]
    faults += [f"{weight}: not a weight of this model" for weight in source.weights if weight not in shapes]
    for weight, stored in source.weights.items():
        faults += _wrong_shape(stored, shapes.get(weight))
    if source.optimizer:
        faults += _optimizer_faults(source.optimizer, shapes)
    if faults:
        raise CheckpointError(f"{name}: does not fit the model {_short(source)}: {problem_list(faults)}")


def _optimizer_faults(optimizer: Mapping[str, AdamWState], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Faults of AdamW's state, which is there for every weight or for none."""
    remedy = "import with --weights-only to leave out the optimizer state"
    for weight, shape in shapes.items():
        state = optimizer.get(weight)
        if state is None:
            yield f"optimizer state of {weight}: missing; {remedy}"
            continue
        for moment in MOMENTS:
            yield from _wrong_shape(getattr(state, moment), shape)
        if not 1 <= state.step <= _LARGEST_STEP:
            yield f"optimizer state of {weight}: step must be from 1 to {_LARGEST_STEP:,}, got {state.step:,}; {remedy}"
    yield from (f"optimizer state of {weight}: not a weight of this model" for weight in optimizer.keys() - shapes)


def _wrong_shape(stored: StoredTensor, expected: tuple[int, ...] | None) -> Iterator[str]:
    if expected is not None and stored.shape != expected:
        yield f"{stored.where}: has shape {list(stored.shape)} in our layout, but the model needs {list(expected)}"


def _checked(stored: StoredTensor, name: str, *, negative: bool) -> Tensor:
    """Read a tensor and check its shape, dtype and values.

    Args:
        negative: values below 0 are allowed.
    """
    with _damage_reported(f"{name}: {stored.where}"):
        tensor = stored.read().detach()  # DeepSpeed saves float32 weights that require a gradient
    if tuple(tensor.shape) != stored.shape:
        raise CheckpointError(f"{name}: {stored.where} has shape {list(tensor.shape)}, not {list(stored.shape)}")
    if not tensor.is_floating_point() or tensor.itemsize == 1:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{name}: {stored.where} has the dtype {dtype}: quantized weights cannot be trained on; use those of a "
            "checkpoint in float32, bfloat16 or float16"
        )
    low, high = (float(end) for end in torch.aminmax(tensor))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CheckpointError(
            f"{name}: {stored.where} has values that are NaN or infinite, so it cannot be trained on. Copy the "
            "checkpoint again, or use an earlier one"
        )
    if max(-low, high) > torch.finfo(torch.float32).max:
        raise CheckpointError(f"{name}: {stored.where} has values up to {max(-low, high):g}, which float32 cannot hold")
    if low < 0 and not negative:
        raise CheckpointError(
            f"{name}: {stored.where} has values below 0, and a mean of squares has none: the checkpoint is damaged. "
            "Copy it again, or import with --weights-only to leave out the optimizer state"
        )
    return tensor


def _record(source: TrainedCheckpoint, name: str, tokenizer: TrainingTokenizer | None) -> dict[str, Any]:
    """The manifest, without its files. `released` is the base model of runs that start from it, as for a release."""
    recipe = source.spec.as_recipe() | ({"training.seq_len": source.seq_len} if source.seq_len else {})
    known = {"step": source.step, "tokens": source.tokens, "lr": source.lr, "next_lr": source.next_lr}
    return {
        **record_without_training(manifest.IMPORTED, recipe),
        "released": {"name": name, "config": {}, **({"tokenizer": tokenizer.as_record()} if tokenizer else {})},
        manifest.TRAINED_BY: {
            "trainer": source.trainer,
            **{key: value for key, value in known.items() if value is not None},
            **({"optimizer": "AdamW", "settings": dict(source.settings)} if source.optimizer else {}),
        },
    }


def _report(source: TrainedCheckpoint, out: Path, tokenizer: TrainingTokenizer | None) -> Iterator[str]:
    """What was imported, what was not, and what the next stage needs."""
    yield f"imported: {len(source.weights):,} weights, and {_optimizer_text(source)}"
    lr, when = (source.lr, "last") if source.next_lr is None else (source.next_lr, "next")
    facts = (("step", source.step, "{:,}"), ("tokens", source.tokens, "{:,}"), (f"LR of the {when} step", lr, "{:.4g}"))
    yield "; ".join(f"{name}: {'unknown' if value is None else form.format(value)}" for name, value, form in facts)
    yield from (f"not imported: {what}" for what in source.not_imported)
    yield from (f"note: {note}" for note in source.notes)
    if tokenizer is None:
        yield (
            "note: the tokenizer of these weights is unknown: stages that start from them cannot check that theirs is "
            "the same one; --tokenizer PATH records it"
        )
    table = "\n  ".join(as_config_table(source.spec).splitlines())
    keep = ', optimizer_state = "keep"' if source.optimizer else ""
    settings = [f"{key.removeprefix('optimizer.')} = {value:g}" for key, value in source.settings.items()]
    more = "\n  ".join(["", "[optimizer]", *settings]) if settings else ""
    yield f'{out}: written. To start a stage from it, set init = "checkpoint:{out}"{keep}, and\n  {table}{more}'


def _optimizer_text(source: TrainedCheckpoint) -> str:
    if not source.optimizer:
        return "no optimizer state"
    steps = sorted({state.step for state in source.optimizer.values()})
    counts = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
    return f"AdamW's moments of each, after {counts} updates"


def _short(source: TrainedCheckpoint) -> str:
    spec = source.spec
    return f"({spec.family}, {spec.layers} layers, width {spec.width}, {spec.vocab_size:,} vocabulary rows)"
