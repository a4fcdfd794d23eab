"""Small checkpoints of random bytes, and their copies in memory:// (fsspec's dictionary in this process)."""

import os
from pathlib import Path

import fsspec

from titan_cpt.checkpoint import manifest
from titan_cpt.common.run_folder import INTERVAL, checkpoint_folder

URL = "memory://bucket/run"


def save(run: Path, stage: str = "a", steps: int = 4, *, kind: str = INTERVAL, index: int = 0) -> Path:
    """Write a checkpoint of two files."""
    folder = checkpoint_folder(run, stage, steps)
    folder.mkdir(parents=True)
    for name, size in (("rank-00000-0.safetensors", 5000), ("index.json", 70)):
        (folder / name).write_bytes(os.urandom(size))
    record = {"stage": stage, "stage_index": index, "steps_done": steps, "run_step": steps, "kind": kind}
    manifest.write(folder, {**record, "recipe": {}, "fingerprint": "f", "data": {}})
    return folder


def memory() -> fsspec.AbstractFileSystem:
    """The file system of memory://."""
    return fsspec.filesystem("memory")


def damage(path: str, position: int = 30) -> None:
    """Change a byte of an object."""
    content = bytearray(memory().cat_file(path))
    content[position] ^= 1
    memory().pipe_file(path, bytes(content))
