"""Saving and finding the checkpoints of a run: asynchronous checkpointing with torch.distributed.checkpoint (DCP).

`CheckpointManager.save` writes a checkpoint: DCP's planner decides which rank writes which shard, storage.py writes the
shards as safetensors, and the manifest is written last (manifest.py). A checkpoint is the folder
`<stage>/step-<8 digits>`; without a manifest it does not exist. `load_state` in state_dict.py reads it back, under any
parallelism degrees.
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
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.optim import Optimizer

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.state_dict import WeightCopy, reason_of_failure, state_to_save
from titan_cpt.checkpoint.storage import ShardWriter
from titan_cpt.common.run_folder import INTERVAL, checkpoint_folder, checkpoint_folders
from titan_cpt.errors import AccessError, CheckpointError, TitanError

# Before torch 2.13 a stager closes itself after its first use, and the next use of it raises KeyError.
STAGER_CAN_BE_REUSED = torch.__version__ >= "2.13"


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint on disk: its folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]


class CheckpointManager:
    """Writes, prunes and finds the checkpoints of one run. At most one is written at a time, in the background.

    Args:
        run: the run's folder.
        keep_latest: number of interval checkpoints to keep; those at a stage's end or before annealing are always kept.
        keep_every: also keep interval checkpoints whose step is a multiple of this number.
        async_save: write in a background thread (asynchronous checkpointing); else `save` returns when all is written.
        before_save: called on rank 0 before anything is written; an OSError from it makes the save fail.
        on_saved: called from `poll` on rank 0 with the folder of each checkpoint that has been written.
        on_failed: called with the error of a save that failed.
    """

    def __init__(
        self,
        run: Path,
        *,
        keep_latest: int,
        async_save: bool,
        keep_every: int | None = None,
        before_save: Callable[[], None] = lambda: None,
        on_saved: Callable[[Path], None] = lambda folder: None,
        on_failed: Callable[[CheckpointError], None] = lambda error: None,
    ) -> None:
        self.run = run
        self.keep_latest = keep_latest
        self.keep_every = keep_every
        self.async_save = async_save
        self.before_save = before_save
        self.on_saved = on_saved
        self.on_failed = on_failed
        self.waited_s = 0.0
        """Seconds for which the last `save` waited for the previous one to end."""
        self.distributed = dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        # The writing thread has a process group of its own: its collectives must not mix with those of training.
        self.group = dist.new_group(backend="gloo") if self.distributed else None
        self._stager = _new_stager()
        self.misplaced: set[Path] = set()
        """Checkpoints that `listed` and `newest_valid` ignored because someone copied, renamed or moved them."""
        self._pending: _PendingSave | None = None
        self._failure: CheckpointError | None = None  # of the last save
        self._must_succeed = False  # the last save was a stage's end or a pre-anneal point, which later stages load

    def save(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        stage: str,
        steps_done: int,
        record: Mapping[str, Any],
        copies: Mapping[str, WeightCopy] | None = None,
    ) -> None:
        """Start to save the current state, after any earlier save has ended; collective.

        A save that fails, now or in the background, is reported through `on_failed`, and the next save tries again. A
        failed save of a stage's end or a pre-anneal point stops the run: the next call raises.

        Args:
            record: the manifest without its list of files: stage_index, kind, recipe, fingerprint, data, ...
            copies: copies of the weights to save too, see `state_to_save`.

        Raises:
            CheckpointError: the previous save was at a stage's end or a pre-anneal point, and has failed.
        """
        began = time.perf_counter()
        if self._must_succeed:
            self.wait()
        self._finish_pending()
        self.waited_s = time.perf_counter() - began
        self._failure = None
        self._must_succeed = record["kind"] != INTERVAL
        folder = checkpoint_folder(self.run, stage, steps_done)
        if self.rank == 0:
            self._prepare_folder(folder)
        if self._failed_on_any_rank():
            return
        state = state_to_save(model, optimizer, copies)
        record = {**record, "stage": stage, "steps_done": steps_done, "torch": torch.__version__}
        writer = ShardWriter(folder)
        if not STAGER_CAN_BE_REUSED:
            self._stager = _new_stager()
        written = dcp_async_save(state, storage_writer=writer, async_stager=self._stager, process_group=self.group)
        assert isinstance(written, Future), "DCP's async_save returns a future when its stager blocks"
        self._pending = _PendingSave(folder, written, record, writer, self.group)
        if not self.async_save:
            self._finish_pending()

    def poll(self, *, until_done: bool = False) -> None:
        """Call `on_saved` or `on_failed` if a save has ended since the last call; `until_done` waits for its end."""
        if self._pending is not None and (until_done or self._pending.done()):
            self._finish_pending()

    def wait(self) -> None:
        """Wait until the last save has been written; collective.

        Raises:
            CheckpointError: the last save has failed, on any rank.
        """
        self._finish_pending()
        if self._failed_on_any_rank():
            failure = self._failure or CheckpointError(f"{self.run}: rank 0 could not write the last checkpoint")
            failure.on_every_rank = self.distributed
            raise failure

    def _prepare_folder(self, folder: Path) -> None:
        """Create the empty folder of a new checkpoint.

        The run's folder itself is not created again: it may be on a file system that is mounted again later.
        """
        try:
            self.before_save()
            folder.parent.mkdir(exist_ok=True)
            _require_no_foreign_checkpoint(folder)
            manifest.make_room(folder)
        except OSError as error:
            self._report_failure(folder, error)

    def _finish_pending(self) -> None:
        """Wait for the pending save, report its result, and prune old checkpoints."""
        pending = self._pending
        self._pending = None
        if pending is None:
            return
        error = pending.join()
        if error is not None:
            self._report_failure(pending.folder, error)
        elif self.rank == 0:
            self.on_saved(pending.folder)
            self._prune(pending.folder)

    def _report_failure(self, folder: Path, error: BaseException) -> None:
        self._failure = self._write_error(folder, error)
        self.on_failed(self._failure)

    def _failed_on_any_rank(self) -> bool:
        """Whether the last save failed on any rank; collective."""
        if not self.distributed:
            return self._failure is not None
        failed = torch.tensor(int(self._failure is not None))
        dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=self.group)
        return bool(failed.item())

    def _prune(self, written: Path) -> None:
        """Remove interval checkpoints beyond keep_latest, except the one just written.

        After a rollback behind a damaged checkpoint, the one just written is not the newest by step.
        """
        intervals = [found for found in self.listed() if found.manifest["kind"] == INTERVAL]
        for found in intervals[self.keep_latest :]:
            permanent = self.keep_every is not None and found.manifest["steps_done"] % self.keep_every == 0
            if found.folder != written and not permanent:
                try:
                    manifest.remove(found.folder)
                except OSError as error:
                    reason = reason_of_failure(error)
                    self.on_failed(CheckpointError(f"{found.folder}: cannot be removed, and is kept: {reason}"))

    def _write_error(self, folder: Path, error: BaseException) -> CheckpointError:
        newest = next((found.folder for found in self.listed() if found.folder != folder), None)
        earlier = f"{newest} is the newest complete checkpoint" if newest else "there is no earlier checkpoint"
        return CheckpointError(
            f"{folder}: cannot be written: {reason_of_failure(error)}; {earlier}. Make room there: the next save "
            "tries again, and after a run has ended the same command resumes from the newest complete checkpoint"
        )

    def listed(self) -> list[FoundCheckpoint]:
        """All checkpoints with a readable manifest, newest first. Their other files are not checked."""
        try:
            return self._listed(lambda error: None)
        except AccessError:
            return []  # only messages and pruning use this list, and pruning removes nothing that is not listed

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
        """The newest checkpoint whose files match their checksums, the same on every rank, or None; collective.

        Args:
            on_damaged: called with a message for each damaged checkpoint that is skipped.

        Raises:
            AccessError: the system refuses to read a manifest, a folder or a file. The checkpoint may be intact, so no
                older one is used instead: the run would train its steps again and overwrite it.
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
        """Compare a checkpoint's files with their checksums and return its manifest; collective; ranks share the work.

        Raises:
            CheckpointError, AccessError: raised on every rank if any rank found a fault.
        """
        ranks = dist.get_world_size() if self.distributed else 1
        record: dict[str, Any] = {}
        faults: list[TitanError | None] = [None] * ranks
        try:
            record = manifest.verify(folder, share=self.rank, shares=ranks)
        except (CheckpointError, AccessError) as error:
            faults[self.rank] = error
        if self.distributed:
            dist.all_gather_object(faults, faults[self.rank], group=self.group)
        _raise_first(faults, AccessError)
        _raise_first(faults, TitanError)
        return record


def _new_stager() -> DefaultStager:
    """Copies the state to host memory, pinned with CUDA, from which it is written while training changes the original.

    The first save allocates that memory; later saves with the same stager reuse it.
    """
    return DefaultStager(StagingOptions(torch.cuda.is_available(), False, False, False))


def _raise_first(faults: Sequence[TitanError | None], kind: type[TitanError]) -> None:
    for fault in faults:
        if isinstance(fault, kind):
            raise fault


class _PendingSave:
    """A save in progress: a thread waits until DCP has written the shards, then rank 0 writes the manifest."""

    def __init__(
        self,
        folder: Path,
        written: Future[Any],
        record: Mapping[str, Any],
        writer: ShardWriter,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.folder = folder
        self._written = written
        self._record = record
        self._writer = writer
        self._group = group
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._finish, name=f"checkpoint {folder.name}")
        self._thread.start()

    def _finish(self) -> None:
        try:
            self._written.result()
            checksums = self._writer.checksums
            if self._group is not None:
                gathered: list[Any] = [None] * dist.get_world_size(self._group)
                dist.all_gather_object(gathered, checksums, group=self._group)
                checksums = {name: file for rank_files in gathered for name, file in rank_files.items()}
            if self._group is None or dist.get_rank() == 0:
                manifest.write(self.folder, self._record, checksums)
        except BaseException as error:  # raised or reported by the training thread
            self._error = error

    def done(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> BaseException | None:
        self._thread.join()
        return self._error


def _require_no_foreign_checkpoint(folder: Path) -> None:
    """Raise FileExistsError if the folder holds a checkpoint of another stage or step, which someone moved here."""
    try:
        record = manifest.read(folder)
    except CheckpointError:
        return  # there is none, or a damaged one, which the new save replaces
    if not manifest.is_in_place(folder, record):
        reason = (
            f"holds the checkpoint of {record['stage']!r} after {record['steps_done']} steps; move it to another folder"
        )
        raise FileExistsError(errno.EEXIST, reason, str(folder))
