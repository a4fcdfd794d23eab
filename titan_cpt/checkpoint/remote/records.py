"""uploads.json in a run's folder: the owner id of its uploads, and the checkpoints whose upload has been verified."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan_cpt.common.files import write_text_atomically
from titan_cpt.common.reading import read_text
from titan_cpt.common.run_folder import MANIFEST_FILE, UPLOADS_FILE


@dataclass
class UploadRecords:
    """The uploads of a run to one URL.

    Attributes:
        run: the run's folder.
        to: the run's URL.
        owner: the id in the URL's owner.json; None before the first upload.
        uploaded: {STAGE/step-00000500: SHA-256 of its manifest}.
    """

    run: Path
    to: str
    owner: str | None = None
    uploaded: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, run: Path, to: str) -> UploadRecords:
        """Read the file; a missing or damaged one, or one of another URL, has no uploads."""
        try:
            record: Any = json.loads(read_text(run / UPLOADS_FILE))
            if record["to"] == to:
                return cls(
                    run, to, record["owner"], {str(key): str(value) for key, value in record["uploaded"].items()}
                )
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        return cls(run, to)

    def write(self) -> None:
        """Write the file.

        Raises:
            OSError: it cannot be written.
        """
        record = {"to": self.to, "owner": self.owner, "uploaded": self.uploaded}
        write_text_atomically(self.run / UPLOADS_FILE, json.dumps(record, indent=1))

    def add(self, folder: Path) -> None:
        """Record that a checkpoint was uploaded and verified; see `write`."""
        self.uploaded[name_of(folder)] = _digest_of_manifest(folder)
        self.write()

    def has(self, folder: Path) -> bool:
        """Whether the checkpoint that is in a folder now was uploaded and verified."""
        try:
            return self.uploaded.get(name_of(folder)) == _digest_of_manifest(folder)
        except OSError:
            return False


def name_of(folder: Path) -> str:
    """The name of a checkpoint within its run: STAGE/step-00000500."""
    return f"{folder.parent.name}/{folder.name}"


def _digest_of_manifest(folder: Path) -> str:
    return hashlib.sha256((folder / MANIFEST_FILE).read_bytes()).hexdigest()
