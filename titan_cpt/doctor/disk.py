"""Checks of the folder for outputs: writable, atomic renames, locks, speed, space, and the clock of the file server."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from titan_cpt.common.file_lock import FileLock
from titan_cpt.doctor.finding import Finding, note, ok, problem
from titan_cpt.errors import TitanError, os_error_message

_MOUNTS = Path("/proc/mounts")
_BLOCK_BYTES = 4 << 20
_MOST_BYTES = 256 << 20
_LONGEST_S = 3.0
_SLOW_BYTES_PER_S = 50e6
_SKEW_S = 5.0
_LOCK_AGAIN = """
import fcntl, os, sys
try:
    fcntl.lockf(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(7)
"""


def check_folder(folder: Path) -> Iterator[Finding]:
    """Everything that a run does in output_dir, in a new folder there, which is removed."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    kind = file_system(existing)
    where = f"{folder} ({kind})" if kind else str(folder)
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".titan-doctor-", dir=existing))
    except OSError as error:
        yield problem("output folder", f"{where}: cannot be written: {os_error_message(error)}",
                      "choose another job.output_dir, or change the folder's permissions")  # fmt: skip
        return
    try:
        yield ok("output folder", f"{where} is writable" + ("" if existing == folder else ", and will be created"))
        if kind in ("tmpfs", "ramfs"):
            yield note("output folder", f"{where} is memory: checkpoints are lost at a reboot", "choose a disk")
        for check in (_rename, _lock, _clock, _speed):
            try:
                yield from check(scratch)
            except OSError as error:
                yield problem("output folder", os_error_message(error), "free disk space or choose another folder")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_space(folder: Path, needed_bytes: int) -> Iterator[Finding]:
    """Free space against the checkpoints of the plan."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    text = f"{free / 2**30:.1f} GiB free; checkpoints of the plan need up to {needed_bytes / 2**30:.2f} GiB"
    if free < needed_bytes:
        yield problem(
            "disk space", text, "free space, choose another job.output_dir, or lower checkpoint.keep_latest_k"
        )
    else:
        yield ok("disk space", text)


def file_system(path: Path) -> str:
    """The kind of the file system of a path, such as ext4, nfs4 or lustre; "" if it is not known."""
    try:
        mounts = [line.split() for line in _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return ""
    real = os.path.realpath(path)
    inside = [parts for parts in mounts if len(parts) > 2 and _is_below(real, parts[1])]
    return max(inside, key=lambda parts: len(parts[1]))[2] if inside else ""


def _is_below(path: str, mount: str) -> bool:
    return path == mount or path.startswith(mount.rstrip("/") + "/")


def _rename(scratch: Path) -> Iterator[Finding]:
    first, second = scratch / "new", scratch / "old"
    first.write_text("new", encoding="utf-8")
    second.write_text("old", encoding="utf-8")
    first.replace(second)
    if second.read_text(encoding="utf-8") == "new" and not first.exists():
        yield ok("rename", "a file replaces another one in one step")
    else:
        yield problem(
            "rename", "a rename did not replace the file", "checkpoints are unsafe here: choose another folder"
        )


def _lock(scratch: Path) -> Iterator[Finding]:
    warnings: list[str] = []
    lock = FileLock(scratch / "lock", warn=warnings.append)
    try:
        acquired = lock.acquire()
        done = subprocess.run([sys.executable, "-c", _LOCK_AGAIN, str(lock.path)], timeout=30, check=False)
    except TitanError as error:
        yield problem("file locks", str(error), "choose another job.output_dir")
        return
    finally:
        lock.close()
    remedy = "mount Lustre with -o flock, start the NFS lock daemon, or make sure that one process uses a run's folder"
    if warnings:
        yield note("file locks", "this file system has none: two processes could train in one folder", remedy)
    elif not acquired or done.returncode != 7:
        yield note("file locks", "a second process got the lock that this one holds", remedy)
    else:
        yield ok("file locks", "a second process does not get a lock that is held")


def _clock(scratch: Path) -> Iterator[Finding]:
    before = time.time()
    (scratch / "clock").write_text("x", encoding="utf-8")
    skew = (scratch / "clock").stat().st_mtime - before
    if abs(skew) > _SKEW_S:
        yield note("clock", f"the file server's clock is {skew:+.0f} s from this machine's", "synchronize both (NTP): "
                   "times in logs and reports are off")  # fmt: skip
    else:
        yield ok("clock", "that of the file system agrees with this machine's")


def _speed(scratch: Path) -> Iterator[Finding]:
    """Write for at most three seconds or 256 MiB, flush to the disk, and read back."""
    file, block = scratch / "speed", os.urandom(_BLOCK_BYTES)
    begin, written = time.perf_counter(), 0
    with file.open("wb", buffering=0) as out:
        while written < _MOST_BYTES and time.perf_counter() - begin < _LONGEST_S:
            out.write(block)
            written += len(block)
        os.fsync(out.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    write = written / (time.perf_counter() - begin)
    begin = time.perf_counter()
    with file.open("rb", buffering=0) as source:
        while source.read(_BLOCK_BYTES):
            pass
    read = written / (time.perf_counter() - begin)
    text = f"{write / 1e6:,.0f} MB/s written with fsync, {read / 1e6:,.0f} MB/s read ({written >> 20} MiB)"
    if write < _SLOW_BYTES_PER_S:
        yield note("disk speed", f"{text}: slow for checkpoints", "choose a faster file system for job.output_dir")
    else:
        yield ok("disk speed", text)
