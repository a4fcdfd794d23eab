"""A checkpoint's copy in object storage: upload, list, verify, download.

A copy is complete when its manifest.json is there, which is written last, after the other files have been verified.
It has the bytes of the local manifest, so its list of files and checksums holds for both.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from titan_cpt.checkpoint import manifest
from titan_cpt.common.files import write_bytes_atomically
from titan_cpt.common.run_folder import MANIFEST_FILE
from titan_cpt.errors import CheckpointError, RemoteError
from titan_cpt.object_storage.filesystem import (
    PART_BYTES,
    content_pieces,
    download_file,
    find,
    list_objects,
    read_object,
    remove_object,
    upload_file,
    write_object,
)

_MANIFEST_NAME = re.compile(rf"([^/]+)/(step-\d{{8}})/{re.escape(MANIFEST_FILE)}")
_FILE_NAME = re.compile(r"(?!\.)[^/\\\x00]+(/(?!\.)[^/\\\x00]+)*")  # relative, without hidden files and ".."


@dataclass(frozen=True)
class RemoteCheckpoint:
    """A complete copy: its URL, its name STAGE/step-00000500, and its manifest."""

    url: str
    name: str
    manifest: dict[str, Any]

    @property
    def age(self) -> tuple[int, int]:
        """Stage index and steps done: greater for a later checkpoint."""
        return self.manifest["stage_index"], self.manifest["steps_done"]

    @property
    def size_bytes(self) -> int:
        """Sum of the lengths of its files."""
        return sum(file["bytes"] for file in self.manifest["files"].values())


def upload_copy(
    folder: Path,
    url: str,
    *,
    before_manifest: Callable[[], None],
    on_progress: Callable[[int], None] = lambda count_bytes: None,
) -> bytes:
    """Upload a checkpoint. Files that an interrupted upload completed are verified and not uploaded again.

    Args:
        folder: the local checkpoint.
        url: where its copy goes.
        before_manifest: called when all other files have been verified; its error prevents that the copy exists.
        on_progress: called with numbers of bytes that were transferred.

    Returns:
        The manifest of the copy.

    Raises:
        FileNotFoundError: the local checkpoint was removed meanwhile.
        CheckpointError: a local file differs from its checksum.
        RemoteError: storage refuses, does not answer, or has other bytes than were uploaded.
    """
    text = (folder / MANIFEST_FILE).read_bytes()
    files = _files_of(manifest.parse(text.decode(errors="replace"), folder / MANIFEST_FILE), str(folder))
    present = list_objects(url)
    missing = [
        name
        for name, file in files.items()
        if present.get(name) != file["bytes"] or not _is_uploaded(folder / name, f"{url}/{name}", file)
    ]
    if MANIFEST_FILE in present:
        if not missing and read_object(f"{url}/{MANIFEST_FILE}") == text:
            before_manifest()
            return text
        remove_object(f"{url}/{MANIFEST_FILE}")  # another or a damaged checkpoint of that name, which is replaced
    for name, file in files.items():
        if name in missing:
            upload_file(folder / name, f"{url}/{name}", on_progress)
            if not _is_uploaded(folder / name, f"{url}/{name}", file):
                raise RemoteError(f"{url}/{name}: has other content than was uploaded. The upload will be repeated")
    before_manifest()
    write_object(f"{url}/{MANIFEST_FILE}", text)
    if read_object(f"{url}/{MANIFEST_FILE}") != text:
        remove_object(f"{url}/{MANIFEST_FILE}")
        raise RemoteError(f"{url}/{MANIFEST_FILE}: has other content than was uploaded. The upload will be repeated")
    return text


def remove_incomplete(url: str) -> None:
    """Remove the files of a copy that will not be completed."""
    present = list_objects(url)
    if MANIFEST_FILE not in present:
        for name in present:
            remove_object(f"{url}/{name}")


def _is_uploaded(path: Path, url: str, file: dict[str, Any]) -> bool:
    """Whether an object has the length and content of a local file, which is compared with its checksum too.

    The storage's own MD5 is compared if it has one. If there is none, or it differs, as under some encryptions, the
    object is read back.
    """
    md5, checksum, size = _digests(path)
    if (size, checksum) != (file["bytes"], file["xxh3_128"]):
        raise CheckpointError(
            f"{path}: its content changed since it was saved (its checksum differs), so it is not uploaded. An earlier "
            "checkpoint may be intact: `titan-cpt verify` checks one"
        )
    info = find(url)
    if info is None or info.size != size:
        return False
    return info.md5 == md5 or _checksum_of_object(url, size) == checksum


def _digests(path: Path) -> tuple[str, str, int]:
    """MD5 as S3 reports it after `upload_file`, XXH3-128 checksum, and length of a file."""
    checksum = xxhash.xxh3_128()
    parts = []
    size = 0
    with path.open("rb") as file:
        while part := file.read(PART_BYTES):
            checksum.update(part)
            parts.append(hashlib.md5(part, usedforsecurity=False))
            size += len(part)
    if size >= 2 * PART_BYTES:
        joined = hashlib.md5(b"".join(part.digest() for part in parts), usedforsecurity=False)
        return f"{joined.hexdigest()}-{len(parts)}", checksum.hexdigest(), size
    whole = hashlib.md5(path.read_bytes(), usedforsecurity=False)
    return whole.hexdigest(), checksum.hexdigest(), size


def _checksum_of_object(url: str, size: int) -> str:
    checksum = xxhash.xxh3_128()
    for piece in content_pieces(url, size):
        checksum.update(piece)
    return checksum.hexdigest()


def list_copies(url: str, on_damaged: Callable[[str], None]) -> list[RemoteCheckpoint]:
    """The complete copies below a run's URL, newest first. Their files are not read.

    Args:
        on_damaged: called with a message for each copy with a damaged manifest.

    Raises:
        RemoteError: no access, no answer, or the bucket does not exist.
    """
    found = []
    for name in list_objects(url):
        match = _MANIFEST_NAME.fullmatch(name)
        if match is None:
            continue
        try:
            copy = read_copy(f"{url}/{match[1]}/{match[2]}", f"{match[1]}/{match[2]}")
        except CheckpointError as error:
            on_damaged(str(error))
            continue
        if manifest.is_in_place(Path(copy.name), copy.manifest):
            found.append(copy)
    return sorted(found, key=lambda copy: copy.age, reverse=True)


def read_copy(url: str, name: str = "") -> RemoteCheckpoint:
    """Read the manifest of a copy.

    Raises:
        CheckpointError: there is none, or it is damaged.
        RemoteError: no access, no answer, or the bucket does not exist.
    """
    content = read_object(f"{url}/{MANIFEST_FILE}")
    if content is None:
        raise CheckpointError(
            f"{url}: has no {MANIFEST_FILE}, so it is not a checkpoint: its upload may be incomplete, or the name wrong"
        )
    record = manifest.parse(content.decode(errors="replace"), f"{url}/{MANIFEST_FILE}")
    _files_of(record, url)
    return RemoteCheckpoint(url, name, record)


def verify_copy(copy: RemoteCheckpoint) -> None:
    """Read every file of a copy and compare it with its checksum; nothing is stored.

    Raises:
        CheckpointError: a file is missing or differs.
        RemoteError: no access or no answer.
    """
    for name, file in copy.manifest["files"].items():
        info = find(f"{copy.url}/{name}")
        if info is None:
            raise CheckpointError(f"{copy.url}/{name}: is missing; the manifest lists it with {file['bytes']} bytes")
        if info.size != file["bytes"]:
            raise CheckpointError(f"{copy.url}/{name}: has {info.size} bytes, the manifest says {file['bytes']}")
        if _checksum_of_object(f"{copy.url}/{name}", info.size) != file["xxh3_128"]:
            raise CheckpointError(f"{copy.url}/{name}: its content changed since it was saved (its checksum differs)")


def download_copy(copy: RemoteCheckpoint, folder: Path) -> None:
    """Download a copy into a local checkpoint folder, the manifest last, after every file matched its checksum.

    Raises:
        CheckpointError: a file of the copy is missing or damaged; the folder holds no checkpoint then.
        RemoteError: no access or no answer.
        OSError: a local file cannot be written.
    """
    text = read_object(f"{copy.url}/{MANIFEST_FILE}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    manifest.make_room(folder)
    try:
        for name, file in copy.manifest["files"].items():
            url = f"{copy.url}/{name}"
            if find(url) is None:
                raise CheckpointError(f"{url}: is missing; the manifest lists it with {file['bytes']} bytes")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            download_file(url, folder / name)
            same_size = (folder / name).stat().st_size == file["bytes"]
            if not same_size or manifest.content_checksum(folder / name) != file["xxh3_128"]:
                raise CheckpointError(f"{url}: its content changed since it was saved (its checksum differs)")
        if text is None or manifest.parse(text.decode(errors="replace"), copy.url) != copy.manifest:
            raise CheckpointError(f"{copy.url}: was replaced while it was downloaded")
    except CheckpointError:
        manifest.make_room(folder)
        folder.rmdir()
        raise
    write_bytes_atomically(folder / MANIFEST_FILE, text)


def _files_of(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The manifest's list of files, checked: names stay within the folder, entries have a length and a checksum."""
    files: dict[str, Any] = record["files"]
    for name, file in files.items():
        whole = isinstance(file, dict) and isinstance(file.get("bytes"), int) and isinstance(file.get("xxh3_128"), str)
        if not _FILE_NAME.fullmatch(name) or name == MANIFEST_FILE or not whole:
            raise CheckpointError(f"{where}/{MANIFEST_FILE}: damaged: its entry {name!r} is not a file of this folder")
    return files
