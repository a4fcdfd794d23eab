"""Checkpoint conversion to Hugging Face format, for transformers and vLLM: config, tokenizer, weights, model card.

Weights are converted one shard at a time. Each shard is read back and compared bit by bit before the next is written.
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
from titan_cpt.checkpoint.averages import require_weights
from titan_cpt.checkpoint.checkpoint_spec import spec_of_checkpoint
from titan_cpt.checkpoint.hf_config import read_config
from titan_cpt.checkpoint.hf_files import tensors_of
from titan_cpt.checkpoint.hf_import import require_free
from titan_cpt.checkpoint.hf_release import open_released, weight_shapes
from titan_cpt.checkpoint.hf_tokenizer import tokenizer_warning, write_tokenizer
from titan_cpt.checkpoint.model_card import describe_bos, model_card
from titan_cpt.checkpoint.provenance import (
    BaseModelInfo,
    find_base_model,
    find_tokenizer,
    max_sequence_length,
    training_history,
)
from titan_cpt.checkpoint.storage import ShardReader, without_dist_warning
from titan_cpt.common.files import atomic_folder
from titan_cpt.common.weights.named_weights import MODEL, NamedWeights, named_weights
from titan_cpt.data.tokenizer.tokenizer import Tokenizer
from titan_cpt.errors import CheckpointError
from titan_cpt.models.huggingface_config import config_from_spec
from titan_cpt.models.huggingface_weights import hub_names
from titan_cpt.models.spec import ModelSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export(
    checkpoint: Path | NamedWeights,
    out: Path,
    *,
    dtype: str,
    tokenizer: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    max_positions: int | None = None,
    log: Callable[[str], None],
) -> None:
    """Convert a checkpoint to a Hugging Face model in a new folder.

    Args:
        checkpoint: folder of a run's checkpoint or of an imported model; `FOLDER@average` for the average in it.
        out: new folder; it must not exist, or be empty.
        dtype: a key of `DTYPES`; float32 is exact.
        tokenizer: "bytes", a tokenizer.json or a folder that holds one; None for the run's.
        max_shard_bytes: size of the largest weight file, unless a single weight is larger.
        max_positions: max_position_embeddings in config.json; None for the longest sequence that trained the weights,
            or the base model's max_position_embeddings if that is longer.
        log: called with each line to print.

    Raises:
        CheckpointError: the checkpoint is damaged or lacks the average, `out` exists, or a shard that is read back
            differs.
        OSError: `out` cannot be written.
        DataError: the tokenizer cannot be read, or is not the run's.
    """
    require_free(out)
    weights = named_weights(checkpoint)
    record = manifest.verify(weights.folder)
    require_weights(weights, record)
    spec = spec_of_checkpoint(record, weights.folder)
    base_model = find_base_model(record)
    run_tokenizer = find_tokenizer(record, weights.folder, tokenizer, base_model)
    positions = max_positions or max_sequence_length(record, base_model)
    with atomic_folder(out) as partial:
        files = _write_weights(weights, partial, spec, DTYPES[dtype], max_shard_bytes)
        _write_settings(partial, spec, run_tokenizer, positions=positions, dtype=dtype, base_model=base_model)
        warning = None
        if run_tokenizer is not None:
            write_tokenizer(run_tokenizer, partial, positions)
            warning = tokenizer_warning(partial, run_tokenizer, read_config(partial)["model_type"])
        history = training_history(record)
        card = model_card(
            record, weights, history, base_model, spec, dtype=dtype, tokenizer=run_tokenizer, warning=warning
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
        if open_released(str(partial)).spec != spec:
            raise CheckpointError(f"{out}: its config.json does not describe the model; please report this")
    log(f"{out}: {spec.parameters:,} parameters in {dtype}, {files} file{'s' * (files > 1)}, read back bit by bit")
    log(f"config.json: {read_config(out)['architectures'][0]}, sequences of up to {positions:,} tokens")
    for line in _tokenizer_lines(run_tokenizer, warning):
        log(line)


def _tokenizer_lines(tokenizer: Tokenizer | None, warning: str | None) -> Iterator[str]:
    if tokenizer is not None and tokenizer.add_bos != tokenizer.adds_bos_itself:
        yield f"note: {describe_bos(tokenizer)}"
    if warning is not None:
        yield f"note: {warning}"
    if tokenizer is not None:
        yield f"tokenizer: {tokenizer.name}"
    else:
        yield "no tokenizer: none is known for these weights; give --tokenizer PATH"


def _write_weights(checkpoint: NamedWeights, out: Path, spec: ModelSpec, dtype: torch.dtype, max_bytes: int) -> int:
    """Write the shards one after another and read each one back; returns their number."""
    names = hub_names(spec)
    groups = list(_groups(spec, dtype, max_bytes))
    weight_map: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, 1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {names[name]: tensor.to(dtype) for name, tensor in _load(checkpoint, group).items()}
        _save(tensors, out / file)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        _require_equal(out / file, tensors)
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return len(groups)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the mode of the umask; the library would make it readable for its owner only."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)


def _groups(spec: ModelSpec, dtype: torch.dtype, max_bytes: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Shards: weight name -> shape, in the model's order, of at most `max_bytes` each unless one weight is larger."""
    group: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, lengths in weight_shapes(spec).items():
        needed = torch.Size(lengths).numel() * dtype.itemsize
        if group and size + needed > max_bytes:
            yield group
            group = {}
            size = 0
        group[name] = lengths
        size += needed
    yield group


def _load(checkpoint: NamedWeights, group: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    weights = {name: torch.empty(*lengths, dtype=torch.float32) for name, lengths in group.items()}
    try:
        with without_dist_warning():
            reader = ShardReader(checkpoint.folder, average=checkpoint.average)
            load({MODEL: weights}, storage_reader=reader, no_dist=True)
    except Exception as error:  # any exception of DCP or safetensors
        raise CheckpointError(f"{checkpoint}: its weights do not match its manifest: {error}") from None
    return weights


def _require_equal(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read a file back and raise CheckpointError if a tensor does not have the bits that were written."""
    for name, read_back in tensors_of(file):
        tensor = tensors[name]
        kind = torch.int32 if tensor.dtype == torch.float32 else torch.int16  # compare bits, so that NaN equals NaN
        if read_back.dtype != tensor.dtype or not torch.equal(read_back.view(kind), tensor.view(kind)):
            raise CheckpointError(f"{file}: {name} differs from what was written; the disk may be failing")


def _write_settings(
    out: Path,
    spec: ModelSpec,
    tokenizer: Tokenizer | None,
    *,
    positions: int,
    dtype: str,
    base_model: BaseModelInfo | None,
) -> None:
    """Write config.json and generation_config.json; without a begin-of-document id, bos_token_id is eos_token_id."""
    config = config_from_spec(spec, max_positions=positions, dtype=dtype)
    released = base_model.config if base_model else {}
    token_ids = {key: released[key] for key in ("bos_token_id", "eos_token_id") if released.get(key) is not None}
    if tokenizer is not None:
        begin = tokenizer.eod_id if tokenizer.bos_id is None else tokenizer.bos_id
        token_ids = {"bos_token_id": begin, "eos_token_id": tokenizer.eod_id}
    # None, not absent: transformers' defaults are ids of other vocabularies
    token_ids = {"bos_token_id": None, "eos_token_id": None} | token_ids
    (out / "config.json").write_text(json.dumps(config | token_ids, indent=2), encoding="utf-8")
    (out / "generation_config.json").write_text(
        json.dumps({"_from_model_config": True, **token_ids}, indent=2), encoding="utf-8"
    )
