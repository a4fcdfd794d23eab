"""The files of a released model: config.json and weights in (sharded) safetensors or pytorch_model.bin, read in part.

Nothing in them is ever executed: safetensors holds bytes alone, and a pytorch_model.bin is opened with `weights_only`.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from titan_cpt.errors import CheckpointError, how_to_install

_REMEDY = "Get the files again, all of one release"
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_HUB_NOT = ("*/*", "consolidated*")  # other formats of the same weights
_WEIGHT_LIKE = ("*.safetensors", "pytorch_model*.bin", "adapter_model.*", "consolidated*", "*.gguf")
_MEAN_ROWS = 8192  # rows that are read at a time for a mean


def released_folder(name: str) -> Path:
    """The folder of a released model: a folder as it stands, or a hub name, downloaded unless it is in the cache.

    Args:
        name: a folder, or "OWNER/NAME", or "OWNER/NAME@REVISION" (a branch, tag or commit, as Pythia's "step3000").

    Raises:
        CheckpointError: it is neither, or the hub cannot be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    repository, _, revision = name.partition("@")
    if name.startswith((".", "/", "~")) or repository.count("/") != 1 or Path(name).exists():
        fault = "is a file, not a folder" if Path(name).exists() else "not a folder"
        raise CheckpointError(f"{name}: {fault}; give a folder with a config.json, or a hub name such as OWNER/NAME")
    try:
        from huggingface_hub import snapshot_download  # an extra: only hub names need it
    except ImportError:
        raise CheckpointError(
            f"{name}: not a folder here, and a download from the Hugging Face hub needs huggingface_hub; "
            f"{how_to_install('huggingface_hub')}"
        ) from None
    files: dict[str, Any] = {"revision": revision or None, "ignore_patterns": list(_HUB_NOT)}
    try:
        folder = Path(snapshot_download(repository, allow_patterns=list(_HUB_FILES), **files))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repository, allow_patterns=[*_HUB_FILES, "pytorch_model*.bin"], **files))
    except Exception as error:  # the hub's own errors, and those of the network below it
        raise CheckpointError(
            f"{name}: not a folder here, and not available from the Hugging Face hub: {_hub_reason(error)}. Check the "
            "name and the network (a gated model needs HF_TOKEN), or download it elsewhere and give its folder"
        ) from None
    return folder


def _hub_reason(error: BaseException) -> str:
    """Why a download failed, in one line without a full stop; "no network" where no name could be resolved."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, socket.gaierror) or "Name or service not known" in str(chain):
            return "no network"
        chain = chain.__cause__ or chain.__context__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .") if lines else type(error).__name__


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a released model.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    return _read_json(folder / "config.json", "it says what model the weights are of")


class WeightFiles:
    """The tensors of a folder by their names in the files, read in part and one after another.

    Attributes:
        shapes: shape of every tensor, from the files' headers.
        largest_file_bytes: size of the largest file.
        entry: the file of weights, or the index of several, that is read.
        other_entries: those of further sets of weights in the folder.
    """

    def __init__(self, folder: Path, entry: Path | None = None) -> None:
        """Find the files and read their headers.

        Args:
            folder: of a released model.
            entry: the file or index to read; left out, the one that transformers reads.

        Raises:
            CheckpointError: there are none, one is missing or damaged, or the index names what it does not hold.
        """
        self.folder = folder
        self.entry, *self.other_entries = [entry] if entry is not None else _entries(folder)
        expected = _read_index(self.entry) if self.entry.suffix == ".json" else None
        files = [self.entry] if expected is None else sorted({folder / file for file in expected.values()})
        self.files = files
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file: dict[str, Path] = {}
        self._unpickled: tuple[Path, Mapping[str, Tensor]] | None = None
        for file in files:
            for name, shape in self._headers(file):
                if name in self._file:
                    raise CheckpointError(
                        f"{folder}: {self._file[name].name} and {file.name} both hold {name}: the files are not of one "
                        f"release. {_REMEDY}"
                    )
                self.shapes[name], self._file[name] = shape, file
        self.largest_file_bytes = max(file.stat().st_size for file in files)
        absent = [name for name, file in (expected or {}).items() if self._file.get(name) != folder / file]
        if expected is not None and absent:
            raise CheckpointError(
                f"{folder / expected[absent[0]]}: does not hold {absent[0]}, which the index says it does "
                f"({len(absent)} such). {_REMEDY}"
            )

    def first_difference(self, other: WeightFiles, names: Sequence[str]) -> str | None:
        """The first of these tensors that is not the same number for number in another set; None where all are."""
        for name in names:
            if self.shapes[name] != other.shapes[name]:
                return name
            one, two = self.read(name), other.read(name)
            if one.dtype != two.dtype:
                one, two = one.float(), two.float()
            if not torch.equal(one, two):
                return name
        return None

    def unread(self) -> Iterator[str]:
        """A note on files that look like weights and belong to no set."""
        known = {*self.files, *(self.folder / file for entry in self.other_entries for file in _listed(entry))}
        found = sorted({path for pattern in _WEIGHT_LIKE for path in self.folder.glob(pattern)} - known)
        if found:
            shown = ", ".join(path.name for path in found[:3]) + (f" and {len(found) - 3} more" if found[3:] else "")
            yield f"{shown}: ignored, {self.entry.name} was read"

    def read(self, name: str, slices: Sequence[slice] = ()) -> Tensor:
        """A tensor, or a part of it, as it is in the file: nothing else of it is brought into memory.

        Raises:
            CheckpointError: the file cannot be read any more.
        """
        file = self._file[name]
        if file.suffix != ".safetensors":
            return self._pickled(file)[name][tuple(slices)]
        with _opened(file) as handle:
            tensor: Tensor = handle.get_slice(name)[tuple(slices)] if slices else handle.get_tensor(name)
        return tensor

    def read_rows(self, name: str, rows: int, slices: Sequence[slice] = ()) -> Tensor:
        """A part of a tensor cut or lengthened to `rows` rows: rows beyond the file's are the mean of the file's.

        A mean row gives a new id, as input, what is common to all, and, as output, the mean of the other logits: by
        Jensen's inequality exp(mean) <= mean(exp), so that n new rows beside N raise a loss by log(1 + n / N) at most.
        Source of the choice: Hewitt 2021, "Initializing new word embeddings for pretrained language models".
        """
        have = self.shapes[name][0]
        wanted = slices[0] if slices else slice(0, rows)
        columns = slices[1:]
        start, stop = wanted.start or 0, min(rows if wanted.stop is None else wanted.stop, rows)
        there = self.read(name, (slice(min(start, have), min(stop, have)), *columns))
        if stop <= have:
            return there
        total = torch.zeros(self.read(name, (slice(0, 1), *columns)).shape[1:], dtype=torch.float64)
        for first in range(0, have, _MEAN_ROWS):
            total += self.read(name, (slice(first, min(first + _MEAN_ROWS, have)), *columns)).double().sum(0)
        new = (total / have).to(there.dtype).expand(stop - max(start, have), *total.shape)
        return torch.cat((there, new))

    def _headers(self, file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
        if file.suffix != ".safetensors":
            for name, tensor in self._pickled(file).items():
                yield name, tuple(tensor.shape)
            return
        with _opened(file) as handle:
            for name in handle.keys():  # noqa: SIM118  (a safetensors handle is no dict)
                yield name, tuple(handle.get_slice(name).get_shape())

    def _pickled(self, file: Path) -> Mapping[str, Tensor]:
        """A pytorch_model.bin, mapped into memory where its format allows it; the last one opened is kept."""
        if self._unpickled is None or self._unpickled[0] != file:
            self._unpickled = None
            self._unpickled = (file, _unpickle(file))
        return self._unpickled[1]


def tensors_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of one safetensors file, one after another.

    Raises:
        CheckpointError: it is damaged.
    """
    with _opened(file) as handle:
        for name in handle.keys():  # noqa: SIM118  (a safetensors handle is no dict)
            yield name, handle.get_tensor(name)


def _entries(folder: Path) -> list[Path]:
    """The sets of weights of a folder in the order in which transformers looks for them: each file before its index."""
    names = [kind + end for kind in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]
    if found := [folder / name for name in names if (folder / name).is_file()]:
        return found
    raise CheckpointError(
        f"{folder}: holds no weights: model.safetensors or pytorch_model.bin, or an index of several files, is wanted"
    )


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name, every file there."""
    folder = index.parent
    weight_map = _read_json(index, "it says which file holds which weight").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map. {_REMEDY}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"{index}: {name} lies in {file!r}, which is no file of this folder. {_REMEDY}")
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file}: is missing; {index.name} lists it. {_REMEDY}")
    return weight_map


def _listed(entry: Path) -> Iterator[str]:
    """The files of a set, as far as they can be told."""
    yield entry.name
    if entry.suffix == ".json":
        try:
            weight_map = _read_json(entry, "").get("weight_map")
        except CheckpointError:
            return
        yield from (
            (file for file in weight_map.values() if isinstance(file, str)) if isinstance(weight_map, dict) else ()
        )


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(str(file), framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: damaged, or not a safetensors file: {error}. {_REMEDY}") from None


def _unpickle(file: Path) -> Mapping[str, Tensor]:
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format of torch before 1.6 cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling a damaged or hostile file ends in
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{file}: damaged, or more than weights (which is never executed): {reason} {_REMEDY}, "
            "as safetensors if it has them"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{file}: is not a table of weights. {_REMEDY}")
    return state


def _read_json(path: Path, what_for: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; {what_for}. Name the folder of a released model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}. {_REMEDY}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object. {_REMEDY}")
    return content
