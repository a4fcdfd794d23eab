"""Files of torch.save that hold objects of other projects: tensors and plain values are read, and no code is executed.

Trainers save their arguments, enums, and numpy's numbers beside the tensors. torch.load with weights_only refuses such
a file. Here every class or function in it that torch does not know becomes a record of its own, which only keeps what
the file says of it; nothing that the file names is imported or called.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from titan_cpt.common.reading import readable
from titan_cpt.errors import CheckpointError

_ZIP = b"PK\x03\x04"


class Record:
    """An object in a file whose class is not known: `args` that it was made with, and its attributes or `state`."""

    def __new__(cls, *args: Any, **_: Any) -> Record:
        """An object without attributes, in any of the ways in which a pickle makes one."""
        self = super().__new__(cls)
        self.args = args
        return self

    def __init__(self, *_: Any) -> None:
        self.args: tuple[Any, ...]

    def __setstate__(self, state: Any) -> None:
        """Keep the attributes, or a state in another form."""
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class _Dictionary:
    """Stands for collections.defaultdict: makes a dictionary."""

    def __new__(cls, *_: Any) -> dict[Any, Any]:  # type: ignore[misc]  # so that its entries can be filled in
        """An empty dictionary."""
        return {}


class _List:
    """Stands for collections.deque: makes a list."""

    def __new__(cls, *_: Any) -> list[Any]:  # type: ignore[misc]
        """An empty list."""
        return []


_STAND_INS = {"collections.defaultdict": _Dictionary, "collections.deque": _List}


def load_torch_file(path: Path) -> Any:
    """Read a file of torch.save; its tensors stay on disk until they are used (mmap).

    Raises:
        CheckpointError: it is missing, ends too early, or is damaged.
        AccessError: the system refuses to read it.
    """
    try:
        with readable(path), path.open("rb") as file:
            start = file.read(len(_ZIP))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing") from None
    if start != _ZIP:
        raise CheckpointError(
            f"{path}: is not a file of torch.save since torch 1.6, or it is damaged; it begins with {start!r}. Copy it "
            "again; if it is older, load it there and save it with a newer torch"
        )
    return _load(path, path, mmap=True)


def load_torch_bytes(content: bytes, where: Path) -> Any:
    """The same, for a part of the file `where`."""
    return _load(io.BytesIO(content), where, mmap=False)


def _load(source: Path | io.BytesIO, where: Path, *, mmap: bool) -> Any:
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(source)
        if isinstance(source, io.BytesIO):
            source.seek(0)
        stand_ins: list[Any] = [(_STAND_INS.get(name) or type("Record", (Record,), {}), name) for name in unknown]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(source, map_location="cpu", mmap=mmap, weights_only=True)
    except Exception as error:  # a damaged file can fail in any way
        raise CheckpointError(f"{where}: cannot be read: {failure_text(error)}; copy the checkpoint again") from None


def failure_text(error: Exception) -> str:
    """The line of torch's message that says what is wrong, without its advice to load the file unsafely."""
    advice = ("Weights only load failed", "Re-running `torch.load`", "Please file", "Check the documentation")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines if not line.startswith(advice)]
    return (reasons or lines or [type(error).__name__])[0].partition(". ")[0].rstrip(".")


def attributes(value: Any) -> Mapping[str, Any]:
    """The attributes of a record, such as argparse's Namespace, or the entries of a dictionary."""
    if isinstance(value, Mapping):
        return {str(key): inner for key, inner in value.items()}
    if isinstance(value, Record):
        return {key: inner for key, inner in vars(value).items() if key != "args"}
    return {}


def plain_number(value: Any) -> float | None:
    """A number as the file has it: of Python, a tensor of one element, or None for anything else."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def whole_number(value: Any) -> int | None:
    """The value if it is an int, otherwise None."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def counted(value: Any, where: str) -> int:
    """The number of updates that an optimizer counts, as an int, a float or a tensor of one element.

    Args:
        where: the count in the other trainer's files, for the message.

    Raises:
        CheckpointError: it is missing or not a whole number, without which AdamW cannot correct the bias of moments.
    """
    number = plain_number(value)
    if number is None or not math.isfinite(number) or number != int(number):
        found = "is missing" if value is None else f"is not a whole number but {str(value)[:80]}"
        raise CheckpointError(f"{where} {found}; import with --weights-only to leave out the optimizer state")
    return int(number)


def known_number(value: Any) -> float | None:
    """`plain_number` if it is finite and not negative, as counts and learning rates are; otherwise None: unknown."""
    number = plain_number(value)
    return number if number is not None and math.isfinite(number) and number >= 0 else None
