"""The manifest that makes a folder a checkpoint: files, sizes, checksums, and what its weights have lived through.

It is written last, by an atomic rename after everything it names has reached the disk. No manifest: no checkpoint.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from titan_cpt.common.files import fsync, write_text_atomically
from titan_cpt.common.reading import is_there, read_text, readable
from titan_cpt.common.run_folder import MANIFEST_FILE, step_name
from titan_cpt.errors import CheckpointError

FORMAT = 2  # 1 was of pickled files, or hashed by SHA-256
_NAMES_SHOWN = 5
_OWN = re.compile(
    r"rank-\d{5}-\d+\.safetensors|index\.json|\.?manifest\.json(\.[\d-]+)?(\.tmp)?"
    r"|__\d+_\d+\.distcp|\.metadata"  # of format 1
    r"|\.nfs[0-9a-f]+"  # what NFS makes of a file that is removed while it is open
)
_KINDS: dict[str, type] = {
    "format": int,
    "stage": str,
    "stage_index": int,
    "steps_done": int,
    "run_step": int,
    "kind": str,
    "recipe": dict,
    "fingerprint": str,
    "data": dict,
    "files": dict,
}


def write(folder: Path, record: Mapping[str, Any], checksums: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """List every file of the folder in its manifest: the moment at which the checkpoint begins to exist.

    Args:
        checksums: {"bytes", "xxh3_128"} of files that were hashed while they were written, and synced; the others are
            read again here.

    Raises:
        CheckpointError: a file does not have the length that was written.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST_FILE:
            name, size = path.relative_to(folder).as_posix(), path.stat().st_size
            known = (checksums or {}).get(name)
            if known is None:
                fsync(path)
                known = {"bytes": size, "xxh3_128": _digest(path)}
            if known["bytes"] != size:
                raise CheckpointError(f"{path}: has {size} bytes, and {known['bytes']} were written")
            files[name] = dict(known)
    write_text_atomically(folder / MANIFEST_FILE, json.dumps({"format": FORMAT, **record, "files": files}, indent=1))
    fsync(folder.parent)


def link_checkpoint(checkpoint: Path, folder: Path, record: Mapping[str, Any]) -> None:
    """A checkpoint that was just verified, there a second time under another record; its files are shared if they can.

    Links and not copies, where the file system has them: nothing here ever writes into a file of a checkpoint.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    make_room(folder)
    for name in record["files"]:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(checkpoint / name, target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(checkpoint / name, target)
            fsync(target)
    write_text_atomically(folder / MANIFEST_FILE, json.dumps(dict(record), indent=1))
    fsync(folder.parent)


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, checked for shape but not against the files.

    Raises:
        CheckpointError: there is none, or it is damaged.
        AccessError: it is there and the system does not let it be read.
    """
    path = folder / MANIFEST_FILE
    try:
        manifest: dict[str, Any] = json.loads(read_text(path))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {_without_manifest(folder)}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    wrong = [
        key for key, kind in _KINDS.items() if not isinstance(manifest, dict) or not isinstance(manifest.get(key), kind)
    ]
    if wrong:
        raise CheckpointError(f"{path}: damaged: {', '.join(wrong)}: missing or of another kind")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path}: is of format {manifest['format']!r}, this version reads {FORMAT}")
    return manifest


def is_in_place(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether a checkpoint lies where its run saved it; one that somebody copied, renamed or moved does not."""
    return (folder.parent.name, folder.name) == (record["stage"], step_name(record["steps_done"]))


def _without_manifest(folder: Path) -> str:
    """What a path is that has no manifest, and where the checkpoints are if it is a run or a stage."""
    if not is_there(folder):
        return f"no such folder, so there is no {MANIFEST_FILE} to read"
    if folder.is_file():
        return f"is a file, not a checkpoint: a checkpoint is a folder with a {MANIFEST_FILE}"
    for kind, pattern in (("a stage of a run", "step-*"), ("a run", "*/step-*")):
        found = sorted(path.parent for path in folder.glob(f"{pattern}/{MANIFEST_FILE}"))
        if found:
            shown = ", ".join(str(path) for path in found[-3:])
            return f"is {kind}, not a checkpoint; its checkpoints are {'..., ' if found[3:] else ''}{shown}"
    why = f"has no {MANIFEST_FILE}, so it is not a checkpoint"
    if folder.name.startswith("step-"):
        return f"{why}: its save was interrupted; an earlier one beside it may be whole"
    if (folder / "config.json").is_file():
        return f"{why} but a released model: `titan-cpt import` makes a checkpoint of it"
    return why


def verify(folder: Path, *, share: int = 0, of: int = 1) -> dict[str, Any]:
    """The manifest, after every file was found with its size and checksum.

    Args:
        share: look at these files alone: every `of`-th, from this one on.
        of: among how many ranks they are shared out.

    Raises:
        CheckpointError: names the first file that is missing, of another size or changed.
        AccessError: the system does not let one of the files be read.
    """
    manifest = read(folder)
    for name, file in list(manifest["files"].items())[share::of]:
        path = folder / name
        if not isinstance(file, dict) or not _is_within(path, folder):
            raise CheckpointError(f"{folder / MANIFEST_FILE}: damaged: its entry {name!r} is not a file of this folder")
        try:
            _compare(path, file)
        except (FileNotFoundError, ValueError):
            raise CheckpointError(f"{path}: is missing; the manifest lists it with {file.get('bytes')} bytes") from None
    return manifest


def _compare(path: Path, file: Mapping[str, Any]) -> None:
    with readable(path):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a file")
        if status.st_size != file.get("bytes"):
            raise CheckpointError(f"{path}: has {status.st_size} bytes, the manifest says {file.get('bytes')}")
        if _digest(path) != file.get("xxh3_128"):
            raise CheckpointError(f"{path}: its content changed since it was saved (its checksum differs)")


def _is_within(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):  # a name that no file system holds
        return False


def remove(folder: Path) -> None:
    """Remove a checkpoint, its manifest first: a crash half-way leaves nothing that looks alive.

    Files that are not the checkpoint's, such as an export or notes that someone put there, stay, and so does the folder
    around them.
    """
    named = _named_in(folder)
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    if not folder.exists():
        return
    fsync(folder)
    foreign = _foreign(folder, named)
    if not foreign:
        shutil.rmtree(folder)
        return
    for path in folder.rglob("*"):
        if path.is_file() and path not in foreign:
            path.unlink()


def make_room(folder: Path) -> None:
    """Remove what a save left here that was interrupted, or a damaged checkpoint, and make the folder anew, empty.

    Raises:
        OSError: the folder cannot be made, or it holds files that are not of a checkpoint, which stay.
    """
    remove(folder)
    if folder.exists():
        left = sorted(path.relative_to(folder).as_posix() for path in _foreign(folder, set()))
        names = ", ".join(left[:_NAMES_SHOWN]) + ", ..." * (len(left) > _NAMES_SHOWN)
        reason = f"holds files that are not of a checkpoint ({names}); move them to another folder"
        raise FileExistsError(errno.EEXIST, reason, str(folder))
    folder.mkdir()


def _named_in(folder: Path) -> set[Path]:
    """The files that a manifest names, as far as it can be read."""
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
        return {folder / name for name in files}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def _foreign(folder: Path, named: set[Path]) -> set[Path]:
    """The files in a folder that are not a checkpoint's: not in its manifest, nor called as a save calls its own."""
    files = {path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    return {path for path in files - named if path.parent != folder or not _OWN.fullmatch(path.name)}


def digest_of_files(record: Mapping[str, Any]) -> str:
    """SHA-256 over a manifest's list of files with their checksums: equal for equal weights and moments."""
    return hashlib.sha256(json.dumps(record["files"], sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = xxhash.xxh3_128()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
