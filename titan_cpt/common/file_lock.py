"""Exclusive locks: one process at a time trains in a run's folder, trains what sweep runs share, or prepares an output.

A lock is a POSIX record lock (fcntl) on a file, and the kernel releases it however the process ends. Not flock, which
child processes inherit and keep for seconds after a kill -9. The file holds who has the lock; that text is advice for
messages and never decides anything, as a killed process leaves its text behind.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from titan_cpt.errors import AccessError

_HELD = (errno.EACCES, errno.EAGAIN)  # POSIX lets fcntl answer with either
# No locks on this file system: Lustre without -o flock, NFS without a lock daemon, FUSE; EINVAL is POSIX's answer.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_LONGEST_TEXT_BYTES = 4096
_LOOKS_FOR_HOLDER = 5  # a new holder writes its name a moment after it gets the lock


def _warn(message: str) -> None:
    print(message, file=sys.stderr)


class FileLock:
    """A lock file, opened and not locked yet.

    Args:
        path: the lock file, created if it is missing; its folder exists.
        warn: called with a message if the file system has no locks; `acquire` then succeeds without one.

    Raises:
        OSError: the file cannot be opened for writing.
    """

    def __init__(self, path: Path, *, warn: Callable[[str], None] = _warn) -> None:
        self.path, self._warn = path, warn
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def acquire(self) -> bool:
        """Take the lock without waiting; False if another process has it.

        Raises:
            AccessError: the system refuses for another reason than these two; names the file.
        """
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                return False
            if error.errno not in _NO_LOCKS:
                raise AccessError(f"{self.path}: cannot be locked: {error.strerror}") from None
            last = self.holder()
            self._warn(
                f"warning: {self.path}: this file system has no file locks ({error.strerror}), so nothing keeps a "
                "second process out. Make sure that only one process works here"
                + (f"; {last} started here and has not ended, or was killed" if last else "")
            )
        self._write(json.dumps(_myself()))
        return True

    def holder(self) -> str:
        """Who has the lock: process id, host and Slurm job, as the holder wrote them; "" if that is not known.

        A text is not believed if it names a process of this host that no longer exists.
        """
        for attempt in range(_LOOKS_FOR_HOLDER):
            if attempt:
                time.sleep(0.02)
            with suppress(OSError):
                if words := _described(os.pread(self._descriptor, _LONGEST_TEXT_BYTES, 0)):
                    return words
        return ""

    def release(self) -> None:
        """Release the lock; may be acquired again."""
        self._write("")
        with suppress(OSError):  # where there are no locks
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close the file, which releases the lock."""
        os.close(self._descriptor)

    def _write(self, text: str) -> None:
        with suppress(OSError):  # a full disk: the lock is what counts
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, text.encode(), 0)


@contextmanager
def exclusive(path: Path, *, held: Callable[[str], Exception]) -> Iterator[None]:
    """Hold the lock for as long as the block runs.

    Args:
        held: makes the error to raise if another process has the lock; called with that process in words, such as
            " (process 1234 on host gpu07, Slurm job 99)", or "" if it is not known.

    Raises:
        OSError, AccessError: the file cannot be opened, or not locked.
    """
    lock = FileLock(path)
    try:
        if not lock.acquire():
            holder = lock.holder()
            raise held(f" ({holder})" if holder else "")
        try:
            yield
        finally:
            lock.release()
    finally:
        lock.close()


def _myself() -> dict[str, object]:
    started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "since": started,
    }


def _described(text: bytes) -> str:
    try:
        told = json.loads(text)
        pid, host, job, since = (told[key] for key in ("pid", "host", "slurm_job_id", "since"))
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""  # empty, half written, or of an older version
    words = (host, since) if job is None else (host, since, job)
    if type(pid) is not int or pid <= 0 or not all(isinstance(each, str) and each.isprintable() for each in words):
        return ""
    if host == socket.gethostname() and not _is_alive(pid):
        return ""
    return f"process {pid} on host {host}{'' if job is None else f', Slurm job {job}'}, since {since}"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # another user's
    return True
