"""Released weights (Hugging Face) into our models: straight into a run's shards, or as a checkpoint of its own.

Each tensor is looked up by its name in the files and read in the part that is wanted: by a rank its own share, under
any layout, by `import` one tensor after another. What is read is then compared with transformers, if it is installed.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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

from titan_cpt import manifest
from titan_cpt.checkpoint_files import ShardReader, ShardWriter
from titan_cpt.errors import CheckpointError
from titan_cpt.models.families import build_model
from titan_cpt.models.huggingface import VOCABULARY_WEIGHTS, foreign_and_missing, hub_names, in_lines
from titan_cpt.models.huggingface_config import shape_from_config
from titan_cpt.models.shapes import ModelShape
from titan_cpt.models.sizes import as_config_table
from titan_cpt.plan import fingerprint
from titan_cpt.weight_files import WeightFiles, read_config, released_folder

IMPORTED = "imported"
"""The `kind` of a checkpoint that was made from a release: weights, and no optimizer state."""

_COMPARED_PARAMETERS = 1_000_000_000  # a run compares models up to this size; `import` asks for memory alone
_TOLERANCE = 1e-3  # of the largest logit, or of 1; two orders of the same fp32 sums differ by 1e-5 or less


@dataclass(frozen=True)
class Released:
    """A released model: its files, checked against what its config.json says.

    Attributes:
        name: as the user gave it.
        shape: of the release; `resized` changes its vocabulary alone.
    """

    name: str
    config: dict[str, Any]
    shape: ModelShape
    files: WeightFiles

    def resized(self, vocab_size: int | None) -> ModelShape:
        """The release's shape with another number of rows, if one is asked for."""
        return self.shape if vocab_size is None else replace(self.shape, vocab_size=vocab_size)

    def read(self, name: str, shape: ModelShape, slices: Sequence[slice] = ()) -> Tensor:
        """One of our weights, or a part of it, in the dtype of the file; embeddings with `shape`'s number of rows."""
        theirs = hub_names(shape)[name]
        if name in VOCABULARY_WEIGHTS:
            return self.files.read_rows(theirs, shape.vocab_size, slices)
        return self.files.read(theirs, slices)

    def told(self, shape: ModelShape) -> str:
        """What was taken, and what became of the vocabulary."""
        old, new = self.shape.vocab_size, shape.vocab_size
        if new < old:
            return f"{self.name}, vocabulary {old:,} -> {new:,} rows: rows from {new:,} on dropped"
        grown = f", vocabulary {old:,} -> {new:,} rows: new rows are the mean of the old" if new > old else ""
        return f"{self.name}{grown}"


def open_released(name: str) -> Released:
    """A folder or a hub name, its config understood and every weight there in its shape.

    Raises:
        CheckpointError: it cannot be had, is damaged, is of a kind that is not computed here, or its weights are not
            those of its config.
    """
    folder = released_folder(name)
    config = read_config(folder)
    shape = shape_from_config(config, str(folder / "config.json"))
    files = WeightFiles(folder)
    foreign, missing = foreign_and_missing(files.shapes, shape)
    names = hub_names(shape)
    faults = [f"{theirs}: missing" for theirs in missing]
    faults += [f"{theirs}: not a weight of the model that config.json describes" for theirs in foreign]
    for ours, wanted in weight_shapes(shape).items():
        found = files.shapes.get(names[ours], wanted)
        if found != wanted:
            faults.append(f"{names[ours]}: is {list(found)}, by config.json it must be {list(wanted)}")
    if faults:
        raise CheckpointError(f"{folder}: the weights do not fit config.json: {in_lines(faults)}")
    return Released(name, config, shape, files)


def weight_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Our name of every weight of such a model -> its shape."""
    with torch.device("meta"):
        model = build_model(shape)
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def load_released(model: nn.Module, name: str, shape: ModelShape) -> str:
    """Fill a model, sharded or not, with released weights; each rank reads its own part. Collective.

    Args:
        model: ours, of `shape`, in any layout.
        name: a folder or a hub name.
        shape: the config's; its number of rows may differ from the release's.

    Returns:
        What was done, in words.

    Raises:
        CheckpointError: the release cannot be read, or is another model than the config's.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    if not first:
        dist.barrier()  # rank 0 downloads, the others find it in the cache
    released = open_released(name)
    if first and dist.is_initialized():
        dist.barrier()
    _require_same_model(released, shape)
    fill(model, released, shape)
    return f"{released.told(shape)}; {_compared_in_a_run(released, shape) if first else ''}"


def _require_same_model(released: Released, ours: ModelShape) -> None:
    changed = manifest.differences(released.resized(ours.vocab_size).as_recipe(), ours.as_recipe())
    if changed:
        table = "\n    ".join(as_config_table(released.shape).splitlines())
        raise CheckpointError(
            "\n  ".join([f"{released.name}: holds another model than the config's:", *changed, f"It is\n    {table}"])
        )


@torch.no_grad()
def fill(model: nn.Module, released: Released, shape: ModelShape) -> None:
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
            local.copy_(released.read(name, shape, slices))
    set_model_state_dict(model, state)


def import_released(name: str, out: Path, *, vocab_size: int | None = None, tell: Callable[[str], None]) -> None:
    """Write a release as a checkpoint for `init = "checkpoint:OUT"`, in float32, one tensor in memory at a time.

    Args:
        name: a folder or a hub name.
        out: the checkpoint's folder; must not be there yet.
        vocab_size: rows of the embeddings, if not the release's.
        tell: is given each line for the user.

    Raises:
        CheckpointError: the release cannot be read, transformers computes something else from it, or `out` is there.
    """
    require_free(out)
    released = open_released(name)
    shape = released.resized(vocab_size)
    tell(f"{released.told(shape)}: {shape.family}, {shape.parameters:,} parameters")
    partial = partial_folder(out)
    try:
        checksums = _stream(released, shape, partial)
        tell(compared(released, shape, lambda model: _load_plain(partial, model)))
        recipe = shape.as_recipe()
        record = {
            "stage": IMPORTED,
            "stage_index": 0,
            "steps_done": 0,
            "run_step": 0,
            "kind": IMPORTED,
            "recipe": recipe,
            "fingerprint": fingerprint(recipe),
            "data": {},
            "released": {"name": name, "config": released.config},
            "torch": torch.__version__,
        }
        manifest.write(partial, record, checksums)
        partial.rename(out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written: {error}. Make room, or name another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    table = "\n  ".join(as_config_table(shape).splitlines())
    tell(f'{out}: written; a stage begins with it by init = "checkpoint:{out}", under\n  {table}')


def require_free(out: Path) -> None:
    """Refuse a folder that is there already.

    Raises:
        CheckpointError: it is, and is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: is there already; remove it, or name another folder")


def partial_folder(out: Path) -> Path:
    """A new folder beside `out` to write into, so that `out` comes to be all at once."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written: {error.strerror}; name another folder") from None
    return partial


@contextmanager
def alone() -> Iterator[None]:
    """For DCP in a process without peers: no warning that there are none, which is what we mean."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


class _ReadWhenWritten(DefaultSavePlanner):
    """Plans with tensors on the meta device, and reads each one when its turn to be written comes."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The weight itself, in float32."""
        return self._read(index.fqn.removeprefix("model.")).float()


def _stream(released: Released, shape: ModelShape, folder: Path) -> dict[str, dict[str, Any]]:
    """Write the weights one after another; returns what `manifest.write` wants to know of the files."""
    state = {
        "model": {
            name: torch.empty(lengths, dtype=torch.float32, device="meta")
            for name, lengths in weight_shapes(shape).items()
        }
    }
    planner = _ReadWhenWritten(lambda name: released.read(name, shape))
    writer = ShardWriter(folder, threads=1)
    with alone():
        save(state, storage_writer=writer, planner=planner, no_dist=True)
    return writer.checksums


def _load_plain(folder: Path, model: nn.Module) -> None:
    """Read back what was written, into a whole model, in place."""
    with alone():
        load({"model": model.state_dict()}, storage_reader=ShardReader(folder), no_dist=True)


def _compared_in_a_run(released: Released, shape: ModelShape) -> str:
    if shape.parameters > _COMPARED_PARAMETERS:
        return "not compared with transformers, as it is large; `titan-cpt import` does"
    return compared(released, shape, lambda model: fill(model, released, shape))


def compared(released: Released, shape: ModelShape, load: Callable[[nn.Module], None]) -> str:
    """Run our model and transformers' on the same tokens, on the CPU in float32; the result in words.

    Args:
        released: what transformers reads.
        shape: ours; of the vocabularies, the rows are compared that both have.
        load: fills our model, which is whole and of this process alone.

    Raises:
        CheckpointError: the logits are not the same.
    """
    try:
        import transformers  # optional, and seconds to import
    except ImportError:
        return "not compared with transformers: it is not installed"
    needed, free = 8 * shape.parameters, _free_bytes()
    if free is not None and needed > 0.8 * free:
        return f"not compared with transformers: needs {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free"
    with torch.device("meta"):
        model = build_model(shape)
    model.to_empty(device="cpu")
    load(model)
    rows = min(shape.vocab_size, released.shape.vocab_size)
    tokens_BL = torch.randint(0, rows, (2, 32), generator=torch.Generator().manual_seed(0))
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(released.files.folder, local_files_only=True)
    with torch.no_grad():
        logits_BLV = model(tokens_BL)[..., :rows]
        their_logits_BLV = theirs.float().eval()(tokens_BL).logits[..., :rows]
    apart, size = (logits_BLV - their_logits_BLV).abs().max().item(), their_logits_BLV.abs().max().item()
    if not apart <= _TOLERANCE * max(1.0, size):
        raise CheckpointError(
            f"{released.name}: transformers {transformers.__version__} computes other logits from it: they differ by "
            f"up to {apart:.2g}, the largest is {size:.2g}. Do not train on it; please report its config.json"
        )
    return f"logits are those of transformers {transformers.__version__} within {apart:.1e} (the largest is {size:.3g})"


def _free_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
