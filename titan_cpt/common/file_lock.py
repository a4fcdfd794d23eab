"""Exclusive file locks: one process at a time trains in a run's folder, trains shared stages, or prepares an output.

A lock is a POSIX record lock (fcntl), which the kernel releases however the process ends. flock is not used: child
processes inherit it and keep it for seconds after a kill -9. The lock file contains the name of its holder, which is
used in messages only: a killed process cannot remove it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from titan_cpt.errors import AccessError

_HELD = (errno.EACCES, errno.EAGAIN)  # another process has the lock; POSIX allows either errno
# The file system has no locks: Lustre without -o flock, NFS without a lock daemon, FUSE; POSIX specifies EINVAL.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_LONGEST_TEXT_BYTES = 4096
_HOLDER_READS = 5  # a new holder writes its name a moment after it gets the lock


def _warn(message: str) -> None:
    print(message, file=sys.stderr)


class FileLock:
    """A lock file that is open and not locked yet.

    Args:
        path: the lock file, created if it is missing; its folder must exist.
        warn: receives a message if the file system has no locks; `acquire` then succeeds without one.

    Raises:
        OSError: the file cannot be opened for writing.
    """

    def __init__(self, path: Path, *, warn: Callable[[str], None] = _warn) -> None:
        self.path = path
        self._warn = warn
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def acquire(self) -> bool:
        """Take the lock without waiting; False if another process has it.

        Raises:
            AccessError: the operating system refuses the lock for another reason.
        """
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                return False
            if error.errno not in _NO_LOCKS:
                raise AccessError(f"{self.path}: cannot be locked: {error.strerror}") from None
            last_holder = self.holder()
            self._warn(
                f"warning: {self.path}: this file system has no file locks ({error.strerror}), so nothing "
                "prevents a second process from working here. Make sure that only one does"
                + (f"; {last_holder} started here and is running, or was killed" if last_holder else "")
            )
        self._write(json.dumps(_this_process()))
        return True

    def holder(self) -> str:
        """Process id, host and Slurm job of the lock's holder, as it wrote them; "" if they are not known.

        A process of this host that no longer exists is not reported.
        """
        for attempt in range(_HOLDER_READS):
            if attempt:
                time.sleep(0.02)
            with suppress(OSError):
                if description := _describe_holder(os.pread(self._descriptor, _LONGEST_TEXT_BYTES, 0)):
                    return description
        return ""

    def release(self) -> None:
        """Release the lock; `acquire` can take it again."""
        self._write("")
        with suppress(OSError):  # the file system has no locks
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close the file, which releases the lock."""
        os.close(self._descriptor)

    def _write(self, text: str) -> None:
        with suppress(OSError):  # such as a full disk; the lock is held nevertheless
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, text.encode(), 0)


def lock_state(path: Path) -> tuple[bool | None, str]:
    """Whether a process holds the lock, and its description as `FileLock.holder` gives it, without taking the lock.

    The first is None if the system does not tell: the file is missing or unreadable, or its file system has no locks.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None, ""
    try:
        with suppress(OSError, ValueError):
            held: bool | None = None
            holder = _describe_holder(os.pread(descriptor, _LONGEST_TEXT_BYTES, 0))
            with suppress(OSError):
                answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, _flock_question())
                held = _flock_type(answer) != fcntl.F_UNLCK
            return held, holder
        return None, ""
    finally:
        os.close(descriptor)


# struct flock in C: the type stands first on Linux, and behind start, length and process id on macOS and the BSDs.
_FLOCK = "hhqqi" if sys.platform.startswith("linux") else "qqihhi"
_FLOCK_TYPE = 0 if sys.platform.startswith("linux") else 3


def _flock_question() -> bytes:
    """The question which lock is in the way of an exclusive one on the whole file."""
    fields = [0] * 5 if sys.platform.startswith("linux") else [0] * 6
    fields[_FLOCK_TYPE] = fcntl.F_WRLCK
    return struct.pack(_FLOCK, *fields)


def _flock_type(answer: bytes) -> int:
    return int(struct.unpack(_FLOCK, answer)[_FLOCK_TYPE])


@contextmanager
def exclusive(path: Path, *, held: Callable[[str], Exception]) -> Iterator[None]:
    """Hold the lock during the block.

    Args:
        held: returns the exception to raise if another process has the lock; its argument describes that process, such
            as " (process 1234 on host gpu07, Slurm job 99)", or is "" if it is not known.

    Raises:
        OSError: the lock file cannot be opened.
        AccessError: the lock file cannot be locked.
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


def _this_process() -> dict[str, object]:
    started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "since": started,
    }


def _describe_holder(text: bytes) -> str:
    try:
        holder = json.loads(text)
        pid, host, job, since = (holder[key] for key in ("pid", "host", "slurm_job_id", "since"))
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""  # empty, incomplete, or of an older version
    texts = (host, since) if job is None else (host, since, job)
    if type(pid) is not int or pid <= 0 or not all(isinstance(each, str) and each.isprintable() for each in texts):
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
        return True  # a process of another user
    return True
