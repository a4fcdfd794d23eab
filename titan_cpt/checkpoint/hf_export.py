"""A checkpoint as a directory that transformers and vLLM load: config, tokenizer, sharded safetensors, model card.

The weights go through one shard at a time, and each shard is read back and compared bit by bit before the next.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.hf_files import read_config, tensors_of
from titan_cpt.checkpoint.hf_import import require_free
from titan_cpt.checkpoint.hf_release import open_released, weight_shapes
from titan_cpt.checkpoint.hf_tokenizer import warning_for_readers, write_tokenizer
from titan_cpt.checkpoint.model_card import bos_in_words, model_card
from titan_cpt.checkpoint.provenance import Origin, find_tokenizer, legs, longest_sequence, origin
from titan_cpt.checkpoint.storage import ShardReader, without_dist_warning
from titan_cpt.common.files import partial_folder
from titan_cpt.common.run_folder import MANIFEST_FILE
from titan_cpt.data.tokenizer.tokenizer import Tokenizer
from titan_cpt.errors import CheckpointError, ConfigError
from titan_cpt.models.huggingface_config import config_from_spec
from titan_cpt.models.huggingface_weights import hub_names
from titan_cpt.models.spec import ModelSpec, spec_from_recipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export(
    checkpoint: Path,
    out: Path,
    *,
    dtype: str,
    tokenizer: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    max_positions: int | None = None,
    log: Callable[[str], None],
) -> None:
    """Write a checkpoint's weights, and what belongs to them, into a new folder.

    Args:
        checkpoint: of a run, or an import.
        out: must not be there yet.
        dtype: a key of `DTYPES`; float32 keeps every bit.
        tokenizer: "bytes", a tokenizer.json or a folder that holds one; left out, the run's own.
        max_shard_bytes: of one file of weights, unless a single weight is larger.
        max_positions: the longest sequence that config.json promises; left out, the longer of what the run was trained
            on and what the release that it began from promises.
        tell: is given each line for the user.

    Raises:
        CheckpointError: the checkpoint is damaged, `out` is there, or what was written is not what is read back.
        OSError: `out` cannot be written.
        DataError: the tokenizer cannot be read, or is not the run's.
    """
    require_free(out)
    record = manifest.verify(checkpoint)
    try:
        spec = spec_from_recipe(record["recipe"])
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / MANIFEST_FILE}: {error}") from None
    came_from = origin(record)
    words = find_tokenizer(record, checkpoint, tokenizer, came_from)
    positions = max_positions or longest_sequence(record, came_from)
    with partial_folder(out) as partial:
        files = _write_weights(checkpoint, partial, spec, DTYPES[dtype], max_shard_bytes)
        _write_settings(partial, spec, words, positions=positions, dtype=dtype, came_from=came_from)
        warning = None
        if words is not None:
            write_tokenizer(words, partial, positions)
            warning = warning_for_readers(partial, words, read_config(partial)["model_type"])
        line = legs(record)
        card = model_card(record, checkpoint, line, came_from, spec, dtype=dtype, tokenizer=words, warning=warning)
        (partial / "README.md").write_text(card, encoding="utf-8")
        if open_released(str(partial)).spec != spec:
            raise CheckpointError(f"{out}: its config.json does not describe the model; please report this")
    log(f"{out}: {spec.parameters:,} parameters in {dtype}, {files} file{'s' * (files > 1)}, read back bit by bit")
    log(f"config.json: {read_config(out)['architectures'][0]}, sequences of up to {positions:,} tokens")
    if words is not None and words.add_bos != words.adds_bos_itself:
        log(f"note: {bos_in_words(words)}")
    if warning is not None:
        log(f"note: {warning}")
    log(f"tokenizer: {words.name}" if words else "no tokenizer: none is known for these weights; give --tokenizer PATH")


def _write_weights(checkpoint: Path, out: Path, spec: ModelSpec, dtype: torch.dtype, max_bytes: int) -> int:
    """Write the shards one after another, each read back at once; returns how many."""
    names, groups = hub_names(spec), list(_groups(spec, dtype, max_bytes))
    weight_map: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, 1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {names[ours]: tensor.to(dtype) for ours, tensor in _load(checkpoint, group).items()}
        _save(tensors, out / file)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        _require_equal(out / file, tensors)
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return len(groups)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file with the mode that the umask gives: the library makes files that only their owner may read."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)


def _groups(spec: ModelSpec, dtype: torch.dtype, max_bytes: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Weights in the model's order, packed into shards."""
    group: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, lengths in weight_shapes(spec).items():
        needed = torch.Size(lengths).numel() * dtype.itemsize
        if group and size + needed > max_bytes:
            yield group
            group, size = {}, 0
        group[name], size = lengths, size + needed
    yield group


def _load(checkpoint: Path, group: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    weights = {name: torch.empty(*lengths, dtype=torch.float32) for name, lengths in group.items()}
    try:
        with without_dist_warning():
            load({"model": weights}, storage_reader=ShardReader(checkpoint), no_dist=True)
    except Exception as error:  # whatever went wrong
        raise CheckpointError(f"{checkpoint}: its weights are not those of its manifest: {error}") from None
    return weights


def _require_equal(file: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, again in tensors_of(file):
        tensor = tensors[name]
        kind = torch.int32 if tensor.dtype == torch.float32 else torch.int16  # bits, so that a NaN is equal to itself
        if again.dtype != tensor.dtype or not torch.equal(again.view(kind), tensor.view(kind)):
            raise CheckpointError(f"{file}: {name} is not what was written; the disk may be failing")


def _write_settings(
    out: Path, spec: ModelSpec, words: Tokenizer | None, *, positions: int, dtype: str, came_from: Origin | None
) -> None:
    """config.json and generation_config.json; without a begin-of-document id, the end-of-document id stands for it."""
    config = config_from_spec(spec, max_positions=positions, dtype=dtype)
    released = came_from.config if came_from else {}
    marks = {key: released[key] for key in ("bos_token_id", "eos_token_id") if released.get(key) is not None}
    if words is not None:
        begin = words.eod_id if words.bos_id is None else words.bos_id
        marks = {"bos_token_id": begin, "eos_token_id": words.eod_id}
    # transformers' own defaults are ids that may mean anything here
    marks = {"bos_token_id": None, "eos_token_id": None} | marks
    (out / "config.json").write_text(json.dumps(config | marks, indent=2), encoding="utf-8")
    (out / "generation_config.json").write_text(
        json.dumps({"_from_model_config": True, **marks}, indent=2), encoding="utf-8"
    )
