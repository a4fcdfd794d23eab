"""Checkpoint conversion from Hugging Face: load weights into a (sharded) model, or write them as a checkpoint.

`load_released` (`init = "hf:NAME"`) lets each rank read only its own shard of each tensor, under any parallelism
degrees. `import_released` (`titan-cpt import`) converts one tensor after another. The result is compared with
transformers, if that is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.checkpoint_spec import model_differences, remedies_of, rope_change
from titan_cpt.checkpoint.hf_release import ReleasedModel, open_released
from titan_cpt.checkpoint.storage import ShardReader, without_dist_warning
from titan_cpt.checkpoint.tokenizer_check import TrainingTokenizer, tokenizer_of_release
from titan_cpt.checkpoint.transformers_check import verify_against_transformers
from titan_cpt.checkpoint.vocabulary.model_rows import NewValues, write_rows
from titan_cpt.checkpoint.vocabulary.new_rows import NewRows, load_vocabulary, require_old_rows
from titan_cpt.checkpoint.vocabulary.vocabulary_rows import released_rows
from titan_cpt.checkpoint.vocabulary.weak_row_report import only_non_finite, weak_row_lines
from titan_cpt.checkpoint.vocabulary.weak_rows import find_weak_rows
from titan_cpt.checkpoint.weights_only import record_without_training, save_weights
from titan_cpt.common.files import atomic_folder
from titan_cpt.data.tokenizer.token_texts import TokenTexts
from titan_cpt.distributed.process_group import raise_on_all_ranks
from titan_cpt.distributed.weight_rows import local_slices
from titan_cpt.errors import CheckpointError, DataError
from titan_cpt.models.huggingface_weights import VOCABULARY_WEIGHTS
from titan_cpt.models.registry import as_config_table
from titan_cpt.models.spec import ModelSpec


def load_released(
    model: nn.Module,
    name: str,
    spec: ModelSpec,
    *,
    new_rope: Collection[str] = (),
    accept: Callable[[Path], str | None] = lambda folder: None,
    examine: Callable[[ReleasedModel], Mapping[str, NewValues]] = lambda released: {},
    new_rows: Callable[[Path], NewRows | None] = lambda folder: None,
) -> str:
    """Load Hugging Face weights into a model, sharded or not; each rank reads only its shards. Collective.

    Args:
        model: the model that `spec` describes, under any parallelism degrees.
        name: a folder or a hub name.
        spec: architecture from the config; its vocab_size may differ from that of the Hugging Face model.
        new_rope: keys of the spec's recipe that the stage's `rope` sets, which may differ from the model's own.
        accept: called on every rank with the model's folder before weights are read; returns a note or raises.
        examine: called on every rank before weights are loaded; returns rows to replace in the loaded weights, or
            raises. Weights with such rows may have others that are not finite among them.
        new_rows: called after `accept`; returns how rows of new ids are computed. None: as `WeightFiles.read_rows`
            resizes the vocabulary.

    Returns:
        A message for the log: the model, its notes, and the result of the comparison with transformers.

    Raises:
        CheckpointError: the Hugging Face model cannot be read, or is not the model that the config describes.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    if not first:
        dist.barrier()  # rank 0 downloads the model; the other ranks find it in the cache
    released = open_released(name, compare_sets=first)
    if first and dist.is_initialized():
        dist.barrier()
    _require_same_model(released, spec, new_rope)
    note = accept(released.files.folder)
    notes = [*released.notes, *filter(None, [note, rope_change(released.spec.rope, spec.rope)])]
    changes = examine(released)
    new = new_rows(released.files.folder)
    if new is None:
        text = released.describe(spec)
        fill(model, released, spec, unchecked=changes)
        write_rows(model, changes)
    else:
        require_old_rows(released.name, released.spec.vocab_size, new)
        text = f"{released.name}; {new.describe(spec.vocab_size, tied=spec.tied)}"
        with raise_on_all_ranks():  # each rank reads the rows of its own shard
            fill(model, released, spec, without=VOCABULARY_WEIGHTS)
            load_vocabulary(model, released.read_file_rows, new, changes)
    if not first:
        return text
    own = released.resized(spec.vocab_size)  # with the RoPE of its config.json, which transformers reads
    result = verify_against_transformers(
        released, own, lambda model: fill(model, released, own, unchecked=changes), in_a_run=True
    )
    return "; ".join([text, *notes, result])


def _require_same_model(released: ReleasedModel, spec: ModelSpec, new_rope: Collection[str]) -> None:
    changed = model_differences(released.resized(spec.vocab_size).as_recipe(), spec.as_recipe(), new_rope)
    if changed:
        table = "\n    ".join(as_config_table(released.spec).splitlines())
        raise CheckpointError(
            "\n  ".join(
                [
                    f"{released.name}: is not the model that the config describes:",
                    *changed,
                    f"It is\n    {table}",
                    *remedies_of(changed),
                ]
            )
        )


@torch.no_grad()
def fill(
    model: nn.Module,
    released: ReleasedModel,
    spec: ModelSpec,
    *,
    unchecked: Container[str] = (),
    without: Container[str] = (),
) -> None:
    """Copy this rank's shard of every weight from the files into the model.

    Args:
        unchecked: names of weights with values that may not be finite.
        without: names of weights that stay as they are.
    """
    state = get_model_state_dict(model)
    for name, weight in state.items():
        assert isinstance(weight, Tensor), f"{name} is not a tensor"
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        if local.numel() and name not in without:
            local.copy_(released.read(name, spec, local_slices(weight), finite=name not in unchecked))
    set_model_state_dict(model, state)


def import_released(name: str, out: Path, *, vocab_size: int | None = None, log: Callable[[str], None]) -> None:
    """Convert a Hugging Face model to a checkpoint for `init = "checkpoint:OUT"`, in float32, one tensor at a time.

    Args:
        name: a folder or a hub name.
        out: the checkpoint's folder; must not exist, or be empty.
        vocab_size: rows of the embedding and the output layer; None for the number that the model has.
        log: called with each line to print.

    Raises:
        CheckpointError: the model cannot be read, transformers computes other logits from it, or `out` exists.
        OSError: `out` cannot be written.
    """
    require_free(out)
    released = open_released(name)
    spec = released.resized(vocab_size)
    log(f"{released.describe(spec)}: {spec.family}, {spec.parameters:,} parameters")
    weak = list(_weak_rows(released, spec))
    with atomic_folder(out) as partial:
        checksums = save_weights(spec, lambda name: released.read(name, spec), partial)
        log(verify_against_transformers(released, spec, lambda model: _load_unsharded(partial, model)))
        for note in (*released.notes, *weak):
            log(f"note: {note}")
        tokenizer = tokenizer_of_release(released.files.folder)
        if tokenizer is None:
            log("note: it has no tokenizer.json: stages that start from it cannot check that theirs is the same one")
        manifest.write(partial, record_of_release(released, spec, tokenizer), checksums)
    table = "\n  ".join(as_config_table(spec).splitlines())
    log(f'{out}: written. To start a stage from it, set init = "checkpoint:{out}", and\n  {table}')


def _weak_rows(released: ReleasedModel, spec: ModelSpec) -> Iterator[str]:
    """Notes on the weak rows of a model.

    Raises:
        CheckpointError: rows are NaN or infinite.
    """
    folder = released.files.folder
    try:
        texts = TokenTexts(str(folder)) if (folder / "tokenizer.json").is_file() else None
    except DataError:
        texts = None
    found = find_weak_rows(released_rows(released, spec.vocab_size), texts.ids if texts else None)
    broken = only_non_finite(found)
    if broken:
        lines = "\n  ".join(weak_row_lines(broken, texts))
        raise CheckpointError(
            f"{released.name}: rows are NaN or infinite:\n  {lines}\nDownload the files again, or start a stage with "
            f'init = "hf:{released.name}" and weak_rows = "mean", which replaces them'
        )
    for line in weak_row_lines(found, texts):
        yield f"weak rows of the {line}"


def record_of_release(released: ReleasedModel, spec: ModelSpec, tokenizer: TrainingTokenizer | None) -> dict[str, Any]:
    """The manifest of a release as a checkpoint, without its files."""
    recorded_tokenizer = {"tokenizer": tokenizer.as_record()} if tokenizer else {}
    return {
        **record_without_training(manifest.IMPORTED, spec.as_recipe()),
        "released": {"name": released.name, "config": released.config, **recorded_tokenizer},
    }


def require_free(out: Path) -> None:
    """Check that an output folder does not exist, or is empty.

    Raises:
        CheckpointError: it exists and is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: already exists; remove it, or give another folder")


def _load_unsharded(folder: Path, model: nn.Module) -> None:
    """Load the written checkpoint into an unsharded model, in place."""
    with without_dist_warning():
        load({"model": model.state_dict()}, storage_reader=ShardReader(folder), no_dist=True)
