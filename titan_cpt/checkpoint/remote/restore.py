"""Continue a run from its uploads: on an empty disk, or where the local folder lacks the newest checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.remote.copies import RemoteCheckpoint, download_copy, list_copies, read_copy
from titan_cpt.checkpoint.remote.owner import Owner
from titan_cpt.checkpoint.remote.records import UploadRecords
from titan_cpt.checkpoint.remote.uploader import RUN_FILES, claim_for
from titan_cpt.common.files import write_bytes_atomically
from titan_cpt.common.run_folder import (
    MANIFEST_FILE,
    METRICS_FILE,
    SKIPPED_FILE,
    checkpoint_folder,
    checkpoint_folders,
)
from titan_cpt.errors import AccessError, CheckpointError, RemoteError
from titan_cpt.object_storage.filesystem import list_objects, read_object

DOWNLOADS_FOLDER = ".downloads"  # in a run's folder: initial weights that a stage takes from object storage


def restore_run(
    run: Path,
    to: str,
    starts: Sequence[tuple[str, tuple[str, int] | None]],
    *,
    misfit: Callable[[dict[str, Any]], str | None],
    say: Callable[[str], None],
) -> Owner | None:
    """Become the owner of a run's uploads; download its newest valid checkpoint if that is newer than the local ones.

    The checkpoints that a later stage starts from are downloaded too, and metrics, summary and skipped batches. Nothing
    that is newer on the local disk is replaced.

    Args:
        run: the run's folder, which this process has locked.
        to: the run's URL.
        starts: the run's stages in order: (name, checkpoint that it starts from as (stage, steps) or None).
        misfit: in what way a checkpoint's manifest does not fit the config; None if it does.
        say: prints a line.

    Returns:
        The session; None if storage does not answer, and the local folder has checkpoints to continue from.

    Raises:
        CheckpointError: the uploads belong to another run, every copy is damaged, or the newest one was trained with
            another config; this run does not become the owner then.
        RemoteError: storage does not answer, and the local folder has no checkpoint or a download was under way.
        OSError: the local folder cannot be written.
    """
    damaged: list[str] = []

    def skip(message: str) -> None:
        if message not in damaged:
            damaged.append(message)
            say(f"skipping damaged upload: {message}")

    records = UploadRecords.read(run, to)
    try:
        copies = list_copies(to, skip)
        _require_fit(run, copies, misfit)
        known = records.owner
        owner = claim_for(run, to, records, say=say)
        if owner.id != known:  # `claim_for` may have waited for another process, which has uploaded more meanwhile
            copies = list_copies(to, skip)
    except RemoteError as error:
        if checkpoint_folders(run):
            say(f"uploads: {error}. Training continues from the local checkpoints, and uploads are tried again")
            return None
        raise RemoteError(
            f"{error}. {run} has no checkpoint, so this must be solved first: {to} may have one to continue from. To "
            "begin anew without uploads, remove checkpoint.upload"
        ) from error
    try:
        damaged += _download_newest(run, to, starts, copies, records, say)
    except RemoteError as error:  # older local checkpoints, also those just downloaded, would train steps again
        raise RemoteError(
            f"{error}. The run continues from a checkpoint that is there and not in {run}, so this must be solved first"
        ) from error
    if damaged and _newest_age(run) is None:
        raise CheckpointError(
            f"{to}: all uploaded checkpoints are damaged. The first: {damaged[0]}. To train from the beginning, choose "
            "another job.name or checkpoint.upload.to"
        )
    return owner


def _require_fit(run: Path, copies: Sequence[RemoteCheckpoint], misfit: Callable[[dict[str, Any]], str | None]) -> None:
    """Refuse to restore a checkpoint that resuming would refuse; an older one in its place would lose its steps."""
    local = _newest_age(run)
    if not copies or (local is not None and copies[0].age <= local):
        return
    if (why := misfit(copies[0].manifest)) is not None:
        stage = copies[0].manifest["stage"]
        raise CheckpointError(
            f"{copies[0].url}: {why}\n  It is newer than the checkpoints in {run}, so it is the one to continue from. "
            f"Restore the settings, or choose another job.name or checkpoint.upload.to. To train {stage!r} again, move "
            f"its checkpoints away here and there: {run / stage} and {copies[0].url.rpartition('/')[0]}"
        )


def _download_newest(
    run: Path,
    to: str,
    starts: Sequence[tuple[str, tuple[str, int] | None]],
    copies: Sequence[RemoteCheckpoint],
    records: UploadRecords,
    say: Callable[[str], None],
) -> list[str]:
    """Download the first of the copies that is newer than the local checkpoints and whole; why others were skipped."""
    newest = _newest_age(run)
    skipped: list[str] = []
    for copy in copies:
        if newest is not None and copy.age <= newest:
            break
        say(f"{run}: restoring {copy.name} from {to} ({copy.size_bytes:,} bytes)")
        try:
            _download_starts(run, copy, copies, starts, records, say)
            _download_run_files(run, to)
            _download(run, copy, records)
        except CheckpointError as error:
            skipped.append(str(error))
            say(f"skipping damaged upload: {error}")
            continue
        break
    return skipped


def _newest_age(run: Path) -> tuple[int, int] | None:
    """Stage index and steps of the newest local checkpoint; None if there is none."""
    ages = []
    for folder in checkpoint_folders(run):
        try:
            record = manifest.read(folder)
        except CheckpointError:
            continue
        if manifest.is_in_place(folder, record):
            ages.append((record["stage_index"], record["steps_done"]))
    return max(ages, default=None)


def _download(run: Path, copy: RemoteCheckpoint, records: UploadRecords) -> None:
    download_copy(copy, run / copy.name)
    records.add(run / copy.name, (run / copy.name / MANIFEST_FILE).read_bytes())


def _download_starts(
    run: Path,
    newest: RemoteCheckpoint,
    copies: Sequence[RemoteCheckpoint],
    starts: Sequence[tuple[str, tuple[str, int] | None]],
    records: UploadRecords,
    say: Callable[[str], None],
) -> None:
    """Download the older checkpoints that a later stage than that of the newest one starts from."""
    by_name = {copy.name: copy for copy in copies}
    for stage, source in starts[newest.manifest["stage_index"] + 1 :]:
        if source is None or source[0] not in [name for name, _ in starts[: newest.manifest["stage_index"] + 1]]:
            continue
        folder = checkpoint_folder(run, *source)
        name = f"{folder.parent.name}/{folder.name}"
        if name == newest.name or (folder / MANIFEST_FILE).exists():
            continue
        if name in by_name:
            say(f"{run}: restoring {name}, from which stage {stage} starts ({by_name[name].size_bytes:,} bytes)")
            _download(run, by_name[name], records)
        elif source[1] <= newest.manifest["steps_done"] or source[0] != newest.manifest["stage"]:
            say(f"warning: {name}, from which stage {stage} starts, was not uploaded")


def _download_run_files(run: Path, to: str) -> None:
    """Download metrics and the other files of the run that are missing here, or are shorter than their copies."""
    stage_files = [name for name in list_objects(to) if name.count("/") == 1 and name.endswith(f"/{SKIPPED_FILE}")]
    for name in (*RUN_FILES, *stage_files):
        path = run / name
        content = read_object(f"{to}/{name}")
        if content is None or (path.exists() and (name != METRICS_FILE or path.stat().st_size >= len(content))):
            continue
        path.parent.mkdir(exist_ok=True)
        write_bytes_atomically(path, content)


def downloaded_initial(run: Path, url: str) -> Path:
    """The folder in a run's folder where the checkpoint of `init = "checkpoint:URL"` is downloaded."""
    return run / DOWNLOADS_FOLDER / hashlib.sha256(url.encode()).hexdigest()[:16]


def download_initial(run: Path, url: str, *, say: Callable[[str], None]) -> None:
    """Download the checkpoint of `init = "checkpoint:URL"`, unless the same one was downloaded already.

    The stage has not begun, so a checkpoint that was replaced in storage since is downloaded again.

    Raises:
        CheckpointError: it is missing or damaged.
        RemoteError: no access or no answer.
    """
    folder = downloaded_initial(run, url)
    exists = (folder / MANIFEST_FILE).exists()
    try:
        copy = read_copy(url.rstrip("/"))
    except (RemoteError, CheckpointError) as error:
        if not exists:
            raise
        say(f"{error}. The initial weights that were downloaded before are used")
        return
    if exists and _is_copy_of(folder, copy):
        return
    say(f"downloading the initial weights {url} ({copy.size_bytes:,} bytes)")
    try:
        download_copy(copy, folder)
    except AccessError as error:
        raise CheckpointError(str(error)) from None


def _is_copy_of(folder: Path, copy: RemoteCheckpoint) -> bool:
    try:
        return manifest.read(folder) == copy.manifest
    except CheckpointError:
        return False
