"""Uploads of a run's checkpoints by a thread beside training; a stalled or dead server never stops a step.

The thread looks at the run's folder and at uploads.json, so nothing is lost when the process is killed: the next start
uploads what is missing. The newest checkpoint goes first. Messages are put into a queue, which the training thread
prints and logs in `poll`.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.remote.copies import remove_incomplete, upload_copy
from titan_cpt.checkpoint.remote.owner import RENEW_SECONDS, Owner, TakenOverError, claim
from titan_cpt.checkpoint.remote.records import UploadRecords, name_of
from titan_cpt.common.run_folder import (
    CONFIG_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    PLAN_FILE,
    SKIPPED_FILE,
    SUMMARY_FILE,
    checkpoint_folder,
    checkpoint_folders,
)
from titan_cpt.errors import AccessError, CheckpointError, RemoteError, os_error_message
from titan_cpt.object_storage.filesystem import write_object

RUN_FILES = (CONFIG_FILE, PLAN_FILE, SUMMARY_FILE, METRICS_FILE)
_FIRST_PAUSE_SECONDS = 2.0  # after a failure; doubled after each further one
_LONGEST_PAUSE_SECONDS = 300.0
_END_SECONDS = 5.0  # `close` waits this long for owner.json to be released


@dataclass(frozen=True)
class UploadMessage:
    """What the thread did: an event's name and fields, and a line to print."""

    event: str
    text: str
    fields: dict[str, Any]


class Uploader:
    """Uploads the checkpoints of one run.

    Args:
        run: the run's folder, which this process has locked.
        to: the run's URL.
        kinds: kinds of checkpoints to upload; those that a stage of plan.json starts from are uploaded in any case.
        owner: this process's session; None if the storage could not be reached yet: the thread then claims it.
    """

    def __init__(self, run: Path, to: str, kinds: Collection[str], owner: Owner | None) -> None:
        self.run = run
        self.to = to
        self._kinds = kinds
        self._starts = _starts_of_stages(run)
        self._owner = owner
        self._records = UploadRecords.read(run, to)
        self._messages: queue.SimpleQueue[UploadMessage] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._refused = False
        self._last_problem = ""
        self._requested = 1  # the number of the last request to look for checkpoints,
        self._completed = 0  # and of the last one after which nothing was left to do
        self._damaged: set[Path] = set()
        self._final = False
        self.progress = 0
        """Grows whenever something was transferred."""
        self._threads = [
            threading.Thread(target=self._work, name="upload", daemon=True),
            threading.Thread(target=self._stay_owner, name="upload owner", daemon=True),
        ]

    def start(self) -> None:
        """Start the thread; it uploads whatever is not uploaded yet."""
        for thread in self._threads:
            thread.start()

    def notify(self) -> None:
        """Tell the thread that there may be a new checkpoint."""
        self._requested += 1
        self._wake.set()

    def messages(self) -> list[UploadMessage]:
        """The messages since the last call."""
        found = []
        while not self._messages.empty():
            found.append(self._messages.get())
        return found

    def is_uploaded(self, folder: Path) -> bool:
        """Whether the checkpoint in a folder was uploaded and verified."""
        return self._records.has(folder)

    def pending(self) -> list[Path]:
        """Checkpoints that are to be uploaded, newest first."""
        found = []
        try:
            folders = checkpoint_folders(self.run)
        except AccessError:
            return []
        for folder in folders:
            try:
                record = manifest.read(folder)
            except (CheckpointError, AccessError):
                continue
            wanted = record["kind"] in self._kinds or name_of(folder) in self._starts
            done = folder in self._damaged or self._records.has(folder)
            if wanted and not done and manifest.is_in_place(folder, record):
                found.append(((record["stage_index"], record["steps_done"]), folder))
        return [folder for _, folder in sorted(found, reverse=True)]

    @property
    def damaged(self) -> list[Path]:
        """Checkpoints that are not uploaded, because their local files differ from their checksums."""
        return sorted(self._damaged)

    def wait(self, *, patience_s: float, limit_s: float | None = None, say: Callable[[str], None]) -> bool:
        """Wait until everything is uploaded, including the run's final metrics and summary.

        Args:
            patience_s: give up after this time without any progress.
            limit_s: give up after this time in any case.
            say: prints a line.

        Returns:
            Whether everything is uploaded.
        """
        self._final = True
        self.notify()
        begin = since = time.monotonic()
        seen = self.progress
        announced = False
        while self._completed < self._requested and not self._refused:
            time.sleep(0.05)
            now = time.monotonic()
            if self.progress != seen:
                seen, since = self.progress, now
            if not announced and now - begin > 1:
                announced = True
                say(
                    f"waiting for {len(self.pending())} uploads to {self.to}; Ctrl-C ends the wait, and "
                    f"`titan-cpt upload {self.run}` finishes them"
                )
            if now - since > patience_s or (limit_s is not None and now - begin > limit_s):
                return False
        return not self._refused and not self.pending()

    def close(self) -> None:
        """End the thread, without waiting for an upload under way; release owner.json if storage answers soon."""
        idle = self._completed >= self._requested
        self._stopped.set()
        self._wake.set()
        if idle and self._owner is not None and not self._refused:
            ending = threading.Thread(target=self._release, daemon=True)
            ending.start()
            ending.join(_END_SECONDS)

    def _release(self) -> None:
        try:
            if self._owner is not None:
                self._owner.renew(done=True)
        except (RemoteError, CheckpointError):
            return  # it counts as dead a few minutes later

    def _work(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while not self._stopped.is_set():
            self._wake.clear()
            request = self._requested
            try:
                more = self._step()
            except CheckpointError as error:  # another run is the owner
                self._refused = True
                self._report("upload_failed", str(error))
                return
            except Exception as error:  # any: uploads never stop training
                reason = os_error_message(error) if isinstance(error, OSError) else str(error) or repr(error)
                self._report("upload_failed", f"upload failed; training continues, and it is tried again: {reason}")
                self._wake.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                continue
            pause = _FIRST_PAUSE_SECONDS
            self._last_problem = ""
            if not more:
                self._completed = request
                self._wake.wait()

    def _step(self) -> bool:
        """Upload the newest pending checkpoint; returns False if there is none."""
        if self._owner is None:
            self._owner = claim_for(self.run, self.to, self._records, say=lambda text: self._report("upload", text))
        pending = self.pending()
        if not pending:
            if self._final:
                self._upload_run_files()
                self._final = False
            return False
        self._upload(pending[0], self._owner)
        return True

    def _upload(self, folder: Path, owner: Owner) -> None:
        url = f"{self.to}/{name_of(folder)}"
        begin = time.monotonic()

        def before_manifest() -> None:
            self._upload_run_files()
            owner.require()

        owner.require()  # before anything of an earlier upload there is replaced
        before = _manifest_in(folder)
        try:
            text = upload_copy(folder, url, before_manifest=before_manifest, on_progress=self._count)
        except FileNotFoundError:  # training has pruned it meanwhile
            owner.require()
            remove_incomplete(url)
            self.progress += 1
            return
        except TakenOverError:
            raise
        except CheckpointError as error:
            if _manifest_in(folder) != before:
                return  # training has replaced it meanwhile, as after a rollback; the next pass uploads the new one
            self._damaged.add(folder)
            self._report("upload_failed", str(error))
            return
        self._records.add(folder, text)
        self.progress += 1
        size = sum(file["bytes"] for file in json.loads(text)["files"].values())
        seconds = time.monotonic() - begin
        self._messages.put(
            UploadMessage(
                "upload",
                f"  uploaded {name_of(folder)} to {self.to}: {size:,} bytes, verified ({seconds:.1f} s)",
                {"folder": str(folder), "url": url, "bytes": size, "seconds": round(seconds, 3)},
            )
        )

    def _upload_run_files(self) -> None:
        """Upload metrics, config, plan and summary, and the batches that stages skip."""
        paths = [self.run / name for name in RUN_FILES] + sorted(self.run.glob(f"*/{SKIPPED_FILE}"))
        for path in paths:
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                continue
            if path.name == METRICS_FILE:
                content = content[: content.rfind(b"\n") + 1]  # training may be writing the last line
            write_object(f"{self.to}/{path.relative_to(self.run).as_posix()}", content)
            self.progress += 1

    def _count(self, count_bytes: int) -> None:
        self.progress += count_bytes

    def _report(self, event: str, text: str) -> None:
        """Put a message into the queue, unless it is the last one again."""
        if text != self._last_problem:
            self._last_problem = text
            self._messages.put(UploadMessage(event, f"  {text}", {"why": text}))

    def _stay_owner(self) -> None:
        while not self._stopped.wait(RENEW_SECONDS):
            try:
                if self._owner is not None:
                    self._owner.renew()
            except (RemoteError, CheckpointError):
                continue  # the uploading thread reports it


def _starts_of_stages(run: Path) -> set[str]:
    """Names of the checkpoints of a run from which its stages start; without them it cannot be continued elsewhere."""
    try:
        stages = json.loads((run / PLAN_FILE).read_bytes())["stages"]
        starts = [stage["init"] for stage in stages if isinstance(stage["init"], dict)]
        return {name_of(checkpoint_folder(run, start["stage"], start["steps_done"])) for start in starts}
    except (OSError, ValueError, KeyError, TypeError):
        return set()  # a run that an older version began, or a damaged file: training writes it anew


def _manifest_in(folder: Path) -> bytes | None:
    try:
        return (folder / MANIFEST_FILE).read_bytes()
    except OSError:
        return None


def claim_for(run: Path, to: str, records: UploadRecords, *, say: Callable[[str], None]) -> Owner:
    """Begin a session as the owner of a run's uploads, and record its id in uploads.json; see `claim`."""
    owner = claim(to, records.owner, has_checkpoints=bool(checkpoint_folders(run)), say=say)
    if records.owner != owner.id:
        records.owner = owner.id
        records.write()
    return owner
