"""Released weights (Hugging Face) into our models: straight into a run's shards, or as a checkpoint of its own.

Each tensor is looked up by its name in the files and read in the part that is wanted: by a rank its own share, under
any layout, by `import` one tensor after another. What is read is then compared with transformers, if it is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.hf_release import Released, open_released, weight_shapes
from titan_cpt.checkpoint.storage import ShardReader, ShardWriter, without_dist_warning
from titan_cpt.checkpoint.tokenizer_check import tokenizer_of_release
from titan_cpt.checkpoint.transformers_check import verify_against_transformers
from titan_cpt.common.files import partial_folder
from titan_cpt.common.recipe import differences, fingerprint
from titan_cpt.errors import CheckpointError
from titan_cpt.models.registry import as_config_table
from titan_cpt.models.spec import ModelSpec

IMPORTED = "imported"
"""The `kind` of a checkpoint that was made from a release: weights, and no optimizer state."""


def load_released(
    model: nn.Module, name: str, spec: ModelSpec, *, accept: Callable[[Path], str | None] = lambda folder: None
) -> str:
    """Fill a model, sharded or not, with released weights; each rank reads its own part. Collective.

    Args:
        model: ours, of `spec`, in any layout.
        name: a folder or a hub name.
        spec: the config's; its number of rows may differ from the release's.
        accept: called on every rank with the release's folder before weights are read: it says something or refuses.

    Returns:
        What was done, in words.

    Raises:
        CheckpointError: the release cannot be read, or is another model than the config's.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    if not first:
        dist.barrier()  # rank 0 downloads, the others find it in the cache
    released = open_released(name, compare_sets=first)
    if first and dist.is_initialized():
        dist.barrier()
    _require_same_model(released, spec)
    note = accept(released.files.folder)
    fill(model, released, spec)
    if not first:
        return released.described(spec)
    result = verify_against_transformers(released, spec, lambda model: fill(model, released, spec), in_a_run=True)
    return "; ".join([released.described(spec), *released.notes, *filter(None, [note]), result])


def _require_same_model(released: Released, ours: ModelSpec) -> None:
    changed = differences(released.resized(ours.vocab_size).as_recipe(), ours.as_recipe())
    if changed:
        table = "\n    ".join(as_config_table(released.spec).splitlines())
        raise CheckpointError(
            "\n  ".join([f"{released.name}: holds another model than the config's:", *changed, f"It is\n    {table}"])
        )


@torch.no_grad()
def fill(model: nn.Module, released: Released, spec: ModelSpec) -> None:
    """Copy the part of every weight that this rank holds from the files into the model."""
    state = get_model_state_dict(model)
    for name, weight in state.items():
        assert isinstance(weight, Tensor), f"{name} is a weight"
        local, slices = weight, [slice(0, length) for length in weight.shape]
        if isinstance(weight, DTensor):
            lengths, offsets = compute_local_shape_and_global_offset(
                weight.shape, weight.device_mesh, weight.placements
            )
            local = weight.to_local()
            slices = [slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True)]
        if local.numel():
            local.copy_(released.read(name, spec, slices))
    set_model_state_dict(model, state)


def import_released(name: str, out: Path, *, vocab_size: int | None = None, log: Callable[[str], None]) -> None:
    """Write a release as a checkpoint for `init = "checkpoint:OUT"`, in float32, one tensor in memory at a time.

    Args:
        name: a folder or a hub name.
        out: the checkpoint's folder; must not be there yet.
        vocab_size: rows of the embeddings, if not the release's.
        tell: is given each line for the user.

    Raises:
        CheckpointError: the release cannot be read, transformers computes something else from it, or `out` is there.
        OSError: `out` cannot be written.
    """
    require_free(out)
    released = open_released(name)
    spec = released.resized(vocab_size)
    log(f"{released.described(spec)}: {spec.family}, {spec.parameters:,} parameters")
    with partial_folder(out) as partial:
        checksums = _stream(released, spec, partial)
        log(verify_against_transformers(released, spec, lambda model: _load_plain(partial, model)))
        for note in released.notes:
            log(f"note: {note}")
        words = tokenizer_of_release(released.files.folder)
        if words is None:
            log("note: it brings no tokenizer.json: stages that begin with it cannot check that theirs is its own")
        recipe = spec.as_recipe()
        record = {
            "stage": IMPORTED,
            "stage_index": 0,
            "steps_done": 0,
            "run_step": 0,
            "kind": IMPORTED,
            "recipe": recipe,
            "fingerprint": fingerprint(recipe),
            "data": {},
            "released": {"name": name, "config": released.config} | ({"tokenizer": words.as_record()} if words else {}),
            "torch": torch.__version__,
        }
        manifest.write(partial, record, checksums)
    table = "\n  ".join(as_config_table(spec).splitlines())
    log(f'{out}: written; a stage begins with it by init = "checkpoint:{out}", under\n  {table}')


def require_free(out: Path) -> None:
    """Refuse a folder that is there already.

    Raises:
        CheckpointError: it is, and is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: is there already; remove it, or name another folder")


class _ReadWhenWritten(DefaultSavePlanner):
    """Plans with tensors on the meta device, and reads each one when its turn to be written comes."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The weight itself, in float32."""
        return self._read(index.fqn.removeprefix("model.")).float()


def _stream(released: Released, spec: ModelSpec, folder: Path) -> dict[str, dict[str, Any]]:
    """Write the weights one after another; returns what `manifest.write` wants to know of the files."""
    state = {
        "model": {
            name: torch.empty(lengths, dtype=torch.float32, device="meta")
            for name, lengths in weight_shapes(spec).items()
        }
    }
    planner = _ReadWhenWritten(lambda name: released.read(name, spec))
    writer = ShardWriter(folder, threads=1)
    with without_dist_warning():
        save(state, storage_writer=writer, planner=planner, no_dist=True)
    return writer.checksums


def _load_plain(folder: Path, model: nn.Module) -> None:
    """Read back what was written, into a whole model, in place."""
    with without_dist_warning():
        load({"model": model.state_dict()}, storage_reader=ShardReader(folder), no_dist=True)
