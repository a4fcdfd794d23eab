"""Saving and loading weights and optimizer with torch.distributed.checkpoint (DCP), while training goes on.

A checkpoint is the folder `<stage>/step-<8 digits>` with a manifest written last (manifest.py). DCP names tensors by
the model's parameter names, so that a checkpoint is read under any layout of ranks. It holds tensors alone: every other
number of the optimizer is the plan's.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.optim import Optimizer

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.storage import ShardReader, ShardWriter
from titan_cpt.common.run_folder import INTERVAL, checkpoint_folder, checkpoint_folders
from titan_cpt.distributed.float8 import in_high_precision
from titan_cpt.errors import AccessError, CheckpointError, TitanError

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(frozen=True)
class FoundCheckpoint:
    """A good checkpoint on disk."""

    folder: Path
    manifest: dict[str, Any]


class CheckpointManager:
    """The checkpoints of one run: at most one is being written while training goes on.

    Args:
        run: the run's folder.
        keep_latest: interval checkpoints that are kept; stage ends and pre-anneal points always are.
        keep_every: so are interval checkpoints at a multiple of so many steps of their stage.
        asynchronous: write in a thread.
        before: called on rank 0 before anything is written; an OSError from it is a save that failed.
        on_saved: called from `poll` on rank 0 with the folder of each checkpoint that has come to exist.
        on_failed: called with what is to be told of a save that failed.
    """

    def __init__(
        self,
        run: Path,
        *,
        keep_latest: int,
        async_save: bool,
        on_saved: Callable[[Path], None],
        keep_every: int | None = None,
        before_save: Callable[[], None] = lambda: None,
        on_failed: Callable[[CheckpointError], None] = lambda error: None,
    ) -> None:
        self.run, self.keep_latest, self.keep_every, self.async_save = run, keep_latest, keep_every, async_save
        self.before_save, self.on_saved, self.on_failed = before_save, on_saved, on_failed
        self.waited_s = 0.0
        """How long the last `save` waited for the one before it."""
        self.distributed = dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        # Collectives of the writing thread must not meet those of the training thread.
        self.group = dist.new_group(backend="gloo") if self.distributed else None
        # The copy that is written while training changes the state; its memory is asked for once, by the first save.
        self._stager = DefaultStager(StagingOptions(torch.cuda.is_available(), False, False, False))
        self.misplaced: set[Path] = set()
        """Checkpoints that `listed` and `newest_good` passed over: somebody copied, renamed or moved them."""
        self._writing: _Writing | None = None
        self._failed: CheckpointError | None = None  # of the last save, if it failed
        self._needed = False  # whether the last save was of a point that later stages begin from

    def save(
        self, model: nn.Module, optimizer: Optimizer, *, stage: str, steps_done: int, record: Mapping[str, Any]
    ) -> None:
        """Begin a save of the state as it is now; an earlier one is waited for first.

        One that fails, now or in the background, is told, and the next one is a new attempt; but no run goes on past a
        stage's end or a pre-anneal point that it could not save.

        Args:
            record: what the manifest holds beside the files: stage_index, kind, recipe, fingerprint, data, ...

        Raises:
            CheckpointError: the save before was one of those, and has failed.
        """
        began = time.perf_counter()
        if self._needed:
            self.wait()
        self._end()
        self.waited_s, self._failed = time.perf_counter() - began, None
        self._needed = record["kind"] != INTERVAL
        folder = checkpoint_folder(self.run, stage, steps_done)
        if self.rank == 0:
            self._make_room(folder)
        if self._has_failed():
            return
        state = {
            "model": in_high_precision(get_model_state_dict(model)),
            "optimizer": _tensors(_optimizer_state(model, optimizer)),
        }
        record = {**record, "stage": stage, "steps_done": steps_done, "torch": torch.__version__}
        writer = ShardWriter(folder)
        written = dcp_async_save(state, storage_writer=writer, async_stager=self._stager, process_group=self.group)
        assert isinstance(written, Future), "async_save with a stager that blocks answers with a future"
        self._writing = _Writing(folder, written, record, writer, self.group)
        if not self.async_save:
            self._end()

    def poll(self, *, until_done: bool = False) -> None:
        """Notice a save that has come to its end, well or not; call it now and then, or wait for that end."""
        if self._writing is not None and (until_done or self._writing.done()):
            self._end()

    def wait(self) -> None:
        """Wait until nothing is being written; collective.

        Raises:
            CheckpointError: the last save has failed, on any rank.
        """
        self._end()
        if self._has_failed():
            failed = self._failed or CheckpointError(f"{self.run}: rank 0 could not write the last checkpoint")
            failed.on_every_rank = self.distributed
            raise failed

    def _make_room(self, folder: Path) -> None:
        """The empty folder of a new checkpoint. The run's own is not made again: it may be mounted again later."""
        try:
            self.before_save()
            folder.parent.mkdir(exist_ok=True)
            _require_no_other(folder)
            manifest.make_room(folder)
        except OSError as error:
            self._fail(folder, error)

    def _end(self) -> None:
        """Wait for the save under way, and take note of how it went."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        error = writing.join()
        if error is not None:
            self._fail(writing.folder, error)
        elif self.rank == 0:
            self.on_saved(writing.folder)
            self._prune(writing.folder)

    def _fail(self, folder: Path, error: BaseException) -> None:
        self._failed = self._cannot_write(folder, error)
        self.on_failed(self._failed)

    def _has_failed(self) -> bool:
        """Whether the last save failed, as rank 0 has it, which knows of every rank's failure; collective."""
        if not self.distributed:
            return self._failed is not None
        failed = torch.tensor(int(self._failed is not None))
        dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=self.group)
        return bool(failed.item())

    def _prune(self, written: Path) -> None:
        """Keep the newest interval checkpoints and the one just written, which a damaged one may seem to follow."""
        kept = [found for found in self.listed() if found.manifest["kind"] == INTERVAL]
        for found in kept[self.keep_latest :]:
            for_good = self.keep_every is not None and found.manifest["steps_done"] % self.keep_every == 0
            if found.folder != written and not for_good:
                try:
                    manifest.remove(found.folder)
                except OSError as error:
                    self.on_failed(CheckpointError(f"{found.folder}: cannot be removed, and stays: {_reason(error)}"))

    def _cannot_write(self, folder: Path, error: BaseException) -> CheckpointError:
        newest = next((found.folder for found in self.listed() if found.folder != folder), None)
        intact = f"{newest} is whole" if newest else "there is no earlier checkpoint"
        return CheckpointError(
            f"{folder}: cannot be written: {_reason(error)}; {intact}. Make room there: the next save "
            "is a new attempt, and after a run that ended the same command goes on from what is whole"
        )

    def listed(self) -> list[FoundCheckpoint]:
        """Every checkpoint whose manifest can be read, newest first. Their files are not checked."""
        try:
            return self._listed(lambda error: None)
        except AccessError:
            return []  # for messages and pruning, which never touch what they do not see

    def _listed(self, on_fault: Callable[[TitanError], None]) -> list[FoundCheckpoint]:
        found = []
        for folder in checkpoint_folders(self.run):
            try:
                record = manifest.read(folder)
            except (CheckpointError, AccessError) as error:
                on_fault(error)
                continue
            if manifest.is_in_place(folder, record):
                found.append(FoundCheckpoint(folder, record))
            else:
                self.misplaced.add(folder)
        return sorted(found, key=lambda f: (f.manifest["stage_index"], f.manifest["steps_done"]), reverse=True)

    def newest_valid(self, on_damaged: Callable[[str], None]) -> FoundCheckpoint | None:
        """The newest checkpoint whose files are all as they were saved; collective, the same answer on every rank.

        Args:
            on_damaged: told of each that is skipped.

        Raises:
            AccessError: the system does not let a manifest, a folder or a file be read. The checkpoint may be whole, so
                no older one is taken in its place: its steps would be trained and written again.
        """
        faults: list[TitanError] = []
        candidates: list[Any] = [[], faults]
        if self.rank == 0:
            try:
                candidates[0] = self._listed(faults.append)
            except AccessError as error:
                faults.append(error)
        if self.distributed:
            dist.broadcast_object_list(candidates, src=0, group=self.group)
        listed, faults = candidates
        _raise_first(faults, AccessError)
        for fault in faults:
            on_damaged(str(fault))
        for found in listed:
            try:
                self.verify(found.folder)
            except CheckpointError as error:
                on_damaged(str(error))
                continue
            return found  # type: ignore[no-any-return]
        return None

    def verify(self, folder: Path) -> dict[str, Any]:
        """The manifest of a checkpoint that is as it was saved; collective, each rank looks at its share of the files.

        Raises:
            CheckpointError, AccessError: on every rank, what any of them found.
        """
        ranks = dist.get_world_size() if self.distributed else 1
        record: dict[str, Any] = {}
        faults: list[TitanError | None] = [None] * ranks
        try:
            record = manifest.verify(folder, share=self.rank, of=ranks)
        except (CheckpointError, AccessError) as error:
            faults[self.rank] = error
        if self.distributed:
            dist.all_gather_object(faults, faults[self.rank], group=self.group)
        _raise_first(faults, AccessError)
        _raise_first(faults, TitanError)
        return record


def _raise_first(faults: Sequence[TitanError | None], kind: type[TitanError]) -> None:
    for fault in faults:
        if isinstance(fault, kind):
            raise fault


class _Writing:
    """A save under way: waits for DCP in a thread of its own, then rank 0 seals the folder with its manifest."""

    def __init__(
        self,
        folder: Path,
        written: Future[Any],
        record: Mapping[str, Any],
        writer: ShardWriter,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.folder, self._written, self._record, self._writer, self._group = folder, written, record, writer, group
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._finish, name=f"seal {folder.name}")
        self._thread.start()

    def _finish(self) -> None:
        try:
            self._written.result()
            checksums = self._writer.checksums
            if self._group is not None:
                gathered: list[Any] = [None] * dist.get_world_size(self._group)
                dist.all_gather_object(gathered, checksums, group=self._group)
                checksums = {name: file for of_rank in gathered for name, file in of_rank.items()}
            if self._group is None or dist.get_rank() == 0:
                manifest.write(self.folder, self._record, checksums)
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
    state: dict[str, Any] = {"model": in_high_precision(get_model_state_dict(model))}
    numbers: dict[str, Any] = {}
    if optimizer is not None:
        numbers = _optimizer_state(model, optimizer)
        state["optimizer"] = _tensors(numbers)
    try:
        load(state, storage_reader=ShardReader(folder))
    except (Exception, CheckpointException) as error:  # DCP's, which wraps the ranks' errors, is a BaseException
        raise CheckpointError(f"{folder}: cannot be loaded into this model: {_reason(error)}") from None
    set_model_state_dict(model, state["model"])
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, {**numbers, **state["optimizer"]}, options=_FLAT)


def _optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state under the parameters' names, of this rank's shards."""
    return get_optimizer_state_dict(model, optimizer, options=_FLAT)


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Moments and step counts: what is left when betas, weight decay and their like are not counted as state."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _require_no_other(folder: Path) -> None:
    """Refuse to save over a checkpoint that somebody put here from elsewhere."""
    try:
        record = manifest.read(folder)
    except CheckpointError:
        return  # none, or damaged: a save makes room there
    if not manifest.is_in_place(folder, record):
        of = (
            f"holds the checkpoint of {record['stage']!r} after {record['steps_done']} steps; move it to another folder"
        )
        raise FileExistsError(errno.EEXIST, of, str(folder))


def _reason(error: BaseException) -> str:
    """What went wrong, without the ranks' tracebacks that DCP puts into its message."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error).rstrip(".")
