"""owner.json beside a run's uploads: which run folder and which process write there. Two of them are refused.

The owner is the run folder whose `uploads.json` has the same id; the session is a process that trains or uploads from
it. A process renews its session every minute. A run on an empty disk becomes the new owner, under a new id, if no
process renews the old session; the old folder is refused from then on, because it lacks what the new one trained.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from titan_cpt.errors import CheckpointError
from titan_cpt.object_storage.filesystem import read_object, write_object

OWNER_FILE = "owner.json"
RENEW_SECONDS = 60.0
_PATIENCE_SECONDS = 150.0  # a process that does not renew its session in this time is dead
_LONG_AGO_SECONDS = 900.0  # a session that was renewed before that, by the clocks, needs no such wait
_POLL_SECONDS = 5.0


class TakenOverError(CheckpointError):
    """Another process has become the owner of these uploads."""


@dataclass
class Owner:
    """This process's session in a run's owner.json.

    Attributes:
        url: the run's URL.
        id: id of the run folder.
        session: id of this process's session.
    """

    url: str
    id: str
    session: str

    def renew(self, *, done: bool = False) -> None:
        """Write that this session is alive, or has ended.

        Raises:
            TakenOverError: another run folder or process has taken over.
            RemoteError: storage refuses or does not answer.
        """
        self.require()
        record = {
            "id": self.id,
            "session": self.session,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "renewed": time.time(),
            "done": done,
        }
        write_object(f"{self.url}/{OWNER_FILE}", json.dumps(record, indent=1).encode())

    def require(self) -> None:
        """Check that this is still the session that writes to the URL; raises as `renew` does."""
        record = _read(self.url)
        if record is not None and record.get("session") != self.session:
            raise TakenOverError(
                f"{self.url}: {_describe(record)} has taken over these uploads, so this process does not write there "
                "any more; its checkpoints on the local disk are intact. Run only one of the two, or choose another "
                "job.name or checkpoint.upload.to"
            )


def claim(url: str, known_id: str | None, *, has_checkpoints: bool, say: Callable[[str], None]) -> Owner:
    """Begin a session as the owner of a run's uploads.

    Args:
        url: the run's URL.
        known_id: the id in the run folder's uploads.json; None if it has none for this URL.
        has_checkpoints: the run folder has checkpoints.
        say: prints a line.

    Raises:
        CheckpointError: the uploads belong to another run folder, or a process that writes them is alive.
        RemoteError: storage refuses or does not answer.
    """
    record = _read(url)
    if record is not None:
        if record.get("id") != known_id and has_checkpoints:
            raise CheckpointError(
                f"{url}: holds the uploads of another run folder ({_describe(record)}), and this folder has "
                "checkpoints of its own, so the two would overwrite each other. To continue the run that is there, "
                "move this folder away; to keep both, choose another job.name or checkpoint.upload.to"
            )
        if _is_alive(url, record, say):
            raise CheckpointError(
                f"{url}: {_describe(record)} is writing uploads there now. Wait for it or end it, or choose another "
                "job.name or checkpoint.upload.to"
            )
    same = record is not None and record.get("id") == known_id
    owner = Owner(url, known_id if same and known_id else uuid.uuid4().hex, uuid.uuid4().hex)
    _take(owner)
    return owner


def _take(owner: Owner) -> None:
    """Write a session over that of a dead process."""
    record = {"id": owner.id, "session": owner.session, "host": socket.gethostname(), "pid": os.getpid()}
    content = {**record, "renewed": time.time(), "done": False}
    write_object(f"{owner.url}/{OWNER_FILE}", json.dumps(content, indent=1).encode())


def _read(url: str) -> dict[str, Any] | None:
    content = read_object(f"{url}/{OWNER_FILE}")
    if content is None:
        return None
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise CheckpointError(
            f"{url}/{OWNER_FILE}: damaged. If no other run writes to {url}, remove this object and start again"
        )
    return record


def _is_alive(url: str, record: dict[str, Any], say: Callable[[str], None]) -> bool:
    """Whether the process of a session still exists: known on this host, otherwise by watching whether it renews."""
    renewed = record.get("renewed")
    old = not isinstance(renewed, int | float) or time.time() - renewed > _LONG_AGO_SECONDS
    pid = record.get("pid")
    if record.get("done") or old or (record.get("host") == socket.gethostname() and not _exists(pid)):
        return False
    say(
        f"{url}: {_describe(record)} wrote uploads there {time.time() - float(renewed or 0):.0f} s ago; waiting up to "
        f"{_PATIENCE_SECONDS:.0f} s to see whether it still runs"
    )
    until = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
        now = _read(url)
        if now != record:
            return now is not None and not now.get("done")
    return False


def _exists(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError, TypeError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _describe(record: dict[str, Any]) -> str:
    return f"process {record.get('pid')} on host {record.get('host')}"
