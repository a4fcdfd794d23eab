"""uploads.json in a run's folder: the owner id of its uploads, and the checkpoints whose upload has been verified.

It holds those of the current URL, and below "elsewhere" those of the URLs that were used before: a run returns to them.
"""

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
        elsewhere: {another URL: its owner and uploads}.
    """

    run: Path
    to: str
    owner: str | None = None
    uploaded: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, run: Path, to: str) -> UploadRecords:
        """Read the file; a missing or damaged one, or one without this URL, has no uploads to it."""
        try:
            record: Any = json.loads(read_text(run / UPLOADS_FILE))
            places = {
                **record.get("elsewhere", {}),
                record["to"]: {"owner": record["owner"], "uploaded": record["uploaded"]},
            }
            here = places.pop(to, {"owner": None, "uploaded": {}})
            uploaded = {str(key): str(value) for key, value in here["uploaded"].items()}
            return cls(run, to, here["owner"], uploaded, places)
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return cls(run, to)

    def write(self) -> None:
        """Write the file.

        Raises:
            OSError: it cannot be written.
        """
        record: dict[str, Any] = {"to": self.to, "owner": self.owner, "uploaded": self.uploaded}
        if self.elsewhere:
            record["elsewhere"] = self.elsewhere
        write_text_atomically(self.run / UPLOADS_FILE, json.dumps(record, indent=1))

    def add(self, folder: Path, manifest: bytes) -> None:
        """Record that the checkpoint with this manifest was uploaded and verified; see `write`.

        Training may have replaced the checkpoint in the folder since the manifest was read.
        """
        self.uploaded[name_of(folder)] = hashlib.sha256(manifest).hexdigest()
        self.write()

    def has(self, folder: Path) -> bool:
        """Whether the checkpoint that is in a folder now was uploaded and verified."""
        try:
            digest = hashlib.sha256((folder / MANIFEST_FILE).read_bytes()).hexdigest()
            return self.uploaded.get(name_of(folder)) == digest
        except OSError:
            return False


def name_of(folder: Path) -> str:
    """The name of a checkpoint within its run: STAGE/step-00000500."""
    return f"{folder.parent.name}/{folder.name}"
