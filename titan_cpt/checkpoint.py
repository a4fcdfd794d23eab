"""Saving and loading weights and optimizer with torch.distributed.checkpoint (DCP), while training goes on.

A checkpoint is the folder `<stage>/step-<8 digits>` with a manifest written last (manifest.py). DCP names tensors by
the model's parameter names, so that a checkpoint is read under any layout of ranks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.optim import Optimizer

from titan_cpt import manifest
from titan_cpt.errors import CheckpointError

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
INTERVAL, STAGE_END, PRE_ANNEAL = "interval", "stage_end", "pre_anneal"


@dataclass(frozen=True)
class Found:
    """A good checkpoint on disk."""

    folder: Path
    manifest: dict[str, Any]


def checkpoint_folder(run: Path, stage: str, steps_done: int) -> Path:
    """Where the checkpoint of a stage after so many steps lies."""
    return run / stage / f"step-{steps_done:08d}"


class Checkpoints:
    """The checkpoints of one run: at most one is being written while training goes on.

    Args:
        run: the run's folder.
        keep_latest: interval checkpoints that are kept; stage ends and pre-anneal points always are.
        asynchronous: write in a thread.
        on_saved: called from `poll` on rank 0 with the folder of each checkpoint that has come to exist.
    """

    def __init__(self, run: Path, *, keep_latest: int, asynchronous: bool, on_saved: Callable[[Path], None]) -> None:
        self.run, self.keep_latest, self.asynchronous, self.on_saved = run, keep_latest, asynchronous, on_saved
        self.distributed = dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        # Collectives of the writing thread must not meet those of the training thread.
        self.group = dist.new_group(backend="gloo") if self.distributed else None
        self._writing: _Writing | None = None

    def save(
        self, model: nn.Module, optimizer: Optimizer, *, stage: str, steps_done: int, record: Mapping[str, Any]
    ) -> None:
        """Begin a save of the state as it is now; an earlier one is waited for first.

        Args:
            record: what the manifest holds beside the files: stage_index, kind, recipe, fingerprint, data, ...

        Raises:
            CheckpointError: this save, or the one before, could not be written.
        """
        self.wait()
        folder = checkpoint_folder(self.run, stage, steps_done)
        try:
            if self.rank == 0:
                manifest.remove(folder)  # what a save left that was cut short, or a damaged one
                folder.mkdir(parents=True)
        except OSError as error:
            raise self._cannot_write(folder, error) from None
        if self.distributed:
            dist.barrier(self.group)
        state = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=_FLAT),
        }
        record = {**record, "stage": stage, "steps_done": steps_done, "torch": torch.__version__}
        writer = FileSystemWriter(folder, sync_files=True, overwrite=False)
        try:
            written = async_save(state, storage_writer=writer, process_group=self.group)
        except (OSError, RuntimeError, CheckpointException) as error:
            raise self._cannot_write(folder, error) from None
        assert isinstance(written, Future), "async_save without an async stager answers with a future"
        self._writing = _Writing(folder, written, record, seal=self.rank == 0)
        if not self.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Notice a save that has come to its end; call it now and then.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            CheckpointError: what was being written could not be.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        error = writing.join()
        if error is not None:
            raise self._cannot_write(writing.folder, error) from None
        if self.rank == 0:
            self.on_saved(writing.folder)
            self._prune(writing.folder)

    def _prune(self, written: Path) -> None:
        """Keep the newest interval checkpoints and the one just written, which a damaged one may seem to follow."""
        kept = [found for found in self.listed() if found.manifest["kind"] == INTERVAL]
        for found in kept[self.keep_latest :]:
            if found.folder != written:
                manifest.remove(found.folder)

    def _cannot_write(self, folder: Path, error: BaseException) -> CheckpointError:
        newest = next((found.folder for found in self.listed() if found.folder != folder), None)
        intact = f"{newest} is whole" if newest else "there is no earlier checkpoint"
        return CheckpointError(
            f"{folder}: cannot be written: {_reason(error)}. Make room or choose another job.output_dir, then run the "
            f"same command again; {intact}"
        )

    def listed(self) -> list[Found]:
        """Every checkpoint with a readable manifest, newest first. Their files are not checked."""
        found = []
        for path in self.run.glob(f"*/step-*/{manifest.NAME}"):
            try:
                found.append(Found(path.parent, manifest.read(path.parent)))
            except CheckpointError:
                continue  # `newest_good` tells of the ones it had to pass over
        return sorted(found, key=lambda f: (f.manifest["stage_index"], f.manifest["steps_done"]), reverse=True)

    def newest_good(self, on_damaged: Callable[[str], None]) -> Found | None:
        """The newest checkpoint whose files are all as they were saved; `on_damaged` is told of each passed over."""
        for path in sorted(self.run.glob(f"*/step-*/{manifest.NAME}")):
            try:
                manifest.read(path.parent)
            except CheckpointError as error:
                on_damaged(str(error))
        for found in self.listed():
            try:
                manifest.verify(found.folder)
            except CheckpointError as error:
                on_damaged(str(error))
                continue
            return found
        return None


class _Writing:
    """A save under way: waits for DCP in a thread of its own, then seals the folder with its manifest (rank 0)."""

    def __init__(self, folder: Path, written: Future[Any], record: Mapping[str, Any], *, seal: bool) -> None:
        self.folder, self._written, self._record, self._seal = folder, written, record, seal
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._finish, name=f"seal {folder.name}")
        self._thread.start()

    def _finish(self) -> None:
        try:
            self._written.result()
            if self._seal:
                manifest.write(self.folder, self._record)
        except BaseException as error:  # handed to the training thread, which tells the user
            self._error = error

    def done(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> BaseException | None:
        self._thread.join()
        return self._error


def load_state(folder: Path, model: nn.Module, optimizer: Optimizer | None) -> None:
    """Read weights, and the optimizer's state if one is given, into what is there.

    Raises:
        CheckpointError: the folder cannot be read, or holds other tensors than the model has.
    """
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    try:
        load(state, storage_reader=FileSystemReader(folder))
    except (Exception, CheckpointException) as error:  # DCP's, which wraps the ranks' errors, is a BaseException
        raise CheckpointError(f"{folder}: cannot be loaded into this model: {_reason(error)}") from None
    set_model_state_dict(model, state["model"])
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_FLAT)


def _reason(error: BaseException) -> str:
    """What went wrong, without the ranks' tracebacks that DCP puts into its message."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error).rstrip(".")
