"""Checkpoint conversion to torchtitan: weights as a DCP folder for its `initial_load_path`, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.averages import require_weights
from titan_cpt.checkpoint.checkpoint_spec import spec_of_checkpoint
from titan_cpt.checkpoint.hf_export import DTYPES
from titan_cpt.checkpoint.hf_import import require_free
from titan_cpt.checkpoint.hf_release import weight_shapes
from titan_cpt.checkpoint.merge.stored_weights import StoredWeights
from titan_cpt.checkpoint.other_trainers.dcp_files import DcpFiles
from titan_cpt.checkpoint.other_trainers.rope_layout import interleaved_from_halves
from titan_cpt.checkpoint.other_trainers.torchtitan.names import EMBEDDING, HEAD, is_interleaved, torchtitan_names
from titan_cpt.checkpoint.storage import without_dist_warning
from titan_cpt.checkpoint.weights_only import LazySavePlanner
from titan_cpt.common.files import atomic_folder
from titan_cpt.common.weights.named_weights import AVERAGE, MODEL, NamedWeights, named_weights
from titan_cpt.errors import CheckpointError
from titan_cpt.models.llama.spec import LlamaSpec
from titan_cpt.models.spec import ModelSpec


def export_to_torchtitan(checkpoint: Path | NamedWeights, out: Path, *, dtype: str, log: Callable[[str], None]) -> None:
    """Write the weights of a checkpoint as torchtitan 0.3 names and orders them, and read them back bit by bit.

    Args:
        checkpoint: folder of a run's checkpoint or of an import; `FOLDER@average` for the average in it.
        out: new folder; it must not exist, or be empty.
        dtype: a key of `DTYPES`; float32 is exact.
        log: called with each line to print.

    Raises:
        CheckpointError: the checkpoint is damaged, its model is none of torchtitan's, `out` exists, or a tensor that is
            read back differs.
        OSError: `out` cannot be written.
    """
    require_free(out)
    weights = named_weights(checkpoint)
    record = manifest.verify(weights.folder)
    require_weights(weights, record)
    spec = _model_of_torchtitan(spec_of_checkpoint(record, weights.folder), weights)
    stored = StoredWeights(weights.folder, spec, AVERAGE if weights.average else MODEL)
    ours = {theirs: name for name, theirs in torchtitan_names(spec).items()}
    if spec.tied:
        ours[HEAD] = ours[EMBEDDING]

    def read(theirs: str) -> Tensor:
        name = ours[theirs]
        tensor = stored.read(name, slice(None))
        if is_interleaved(name, spec):
            tensor = interleaved_from_halves(tensor, spec.head_width)
        return tensor.to(DTYPES[dtype])

    shapes = weight_shapes(spec)
    state = {theirs: torch.empty(shapes[name], dtype=DTYPES[dtype], device="meta") for theirs, name in ours.items()}
    with atomic_folder(out) as partial:
        with without_dist_warning():
            save(state, storage_writer=FileSystemWriter(str(partial)), planner=LazySavePlanner(read), no_dist=True)
        _require_equal_dcp(partial, out, read)
    log(f"{out}: {spec.parameters:,} parameters in {dtype}, a DCP folder with torchtitan's names, read back bit by bit")
    for line in _report(spec, out):
        log(line)


def _model_of_torchtitan(spec: ModelSpec, weights: NamedWeights) -> LlamaSpec:
    """The spec, if torchtitan's llama3 or qwen3 can be that model."""
    faults = []
    if not isinstance(spec, LlamaSpec) or spec.family != "llama":  # other families extend Llama's spec
        faults.append(f"the family {spec.family}")
    else:
        faults += ["a sliding window"] if spec.sliding_window is not None else []
        faults += ["biases of queries, keys and values"] if spec.qkv_bias else []
        scaling = spec.rope_scaling
        if scaling is not None and (scaling.kind != "llama3" or spec.qk_norm):
            faults.append(f"RoPE scaling {scaling.kind!r}{' with norms of queries and keys' if spec.qk_norm else ''}")
    if faults or not isinstance(spec, LlamaSpec):
        raise CheckpointError(
            f"{weights}: torchtitan's llama3 and qwen3 do not have {' and '.join(faults)}: export with --format hf"
        )
    return spec


def _require_equal_dcp(folder: Path, out: Path, read: Callable[[str], Tensor]) -> None:
    """Read the written tensors one by one, and compare their bits with those that were to be written."""
    files = DcpFiles(folder)
    for theirs in files.tensors:
        written, wanted = files.read(theirs), read(theirs)
        if written.dtype != wanted.dtype or not torch.equal(written.view(torch.uint8), wanted.view(torch.uint8)):
            raise CheckpointError(f"{out}: {theirs} differs from what was written; the disk may be failing")


def _report(spec: LlamaSpec, out: Path) -> Iterator[str]:
    """How torchtitan loads it, and what it must be configured with."""
    scaling = spec.rope_scaling
    rope = "none" if scaling is None else f"llama, scaling_factor {scaling.factor:g}, original_max_position_embeddings "
    rope += "" if scaling is None else (
        f"{scaling.original_seq_len}, low_freq_factor {scaling.low_freq_factor:g}, high_freq_factor "
        f"{scaling.high_freq_factor:g}"
    )  # fmt: skip
    yield (
        f"torchtitan loads it with --checkpoint.enable --checkpoint.initial_load_path {out.absolute()}, if its model "
        f"({'qwen3' if spec.qk_norm else 'llama3'}) has dim {spec.width}, {spec.layers} layers, n_heads {spec.heads}, "
        f"n_kv_heads {spec.kv_heads}, head_dim {spec.head_width}, hidden_dim {spec.mlp_width}, vocab_size "
        f"{spec.vocab_size}, norms with eps {spec.norm_eps:g}, RoPE with theta {spec.rope_base:.10g} and scaling "
        f"{rope}, enable_weight_tying {spec.tied}"
    )
    yield "not exported: the optimizer's state, the step, the position in the data and the LR schedule"
