"""Files of a Hugging Face model: config.json, and weights in (sharded) safetensors or pytorch_model.bin.

Weights are read by slices. Nothing in the files is executed: safetensors holds only bytes, and a pytorch_model.bin is
opened with `weights_only`.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from titan_cpt.checkpoint.hf_config import REMEDY, read_release_json
from titan_cpt.errors import CheckpointError, how_to_install

_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_HUB_NOT = ("*/*", "consolidated*")  # the same weights in other formats
_WEIGHT_LIKE = ("*.safetensors", "pytorch_model*.bin", "adapter_model.*", "consolidated*", "*.gguf")
_MEAN_ROWS = 8192  # rows read at a time to compute their mean


def released_folder(name: str) -> Path:
    """The folder of a Hugging Face model; a hub model is downloaded unless it is in the cache.

    Args:
        name: a folder, or "OWNER/NAME", or "OWNER/NAME@REVISION" (branch, tag or commit, such as Pythia's "step3000").

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
        from huggingface_hub import snapshot_download  # an optional dependency: only hub names need it
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
    except Exception as error:  # any exception of huggingface_hub or of the network libraries that it uses
        raise CheckpointError(
            f"{name}: not a folder here, and not available from the Hugging Face hub: {_hub_reason(error)}. Check the "
            "name and the network (a gated model needs HF_TOKEN), or download it elsewhere and give its folder"
        ) from None
    return folder


def _hub_reason(error: BaseException) -> str:
    """Why a download failed, in one line without a full stop; "no network" if a host name was not resolved."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, socket.gaierror) or "Name or service not known" in str(chain):
            return "no network"
        chain = chain.__cause__ or chain.__context__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .") if lines else type(error).__name__


class WeightFiles:
    """The tensors in the weight files of a folder, by their names in the files; read lazily, whole or by slices.

    Of a multimodal model only the text part, whose names have a prefix in the files, and are without it here.

    Attributes:
        prefix: that of the text part; empty for a model of text.
        other_parts: names in the files that lack the prefix.
        shapes: tensor name -> shape, from the files' headers.
        largest_file_bytes: size of the largest file.
        entry: the weight file, or the index of a sharded set, that is read.
        other_entries: weight files or indexes of other sets of weights in the folder.
    """

    def __init__(self, folder: Path, entry: Path | None = None, *, prefix: str = "") -> None:
        """Find the files and read their headers.

        Args:
            folder: of a Hugging Face model.
            entry: the file or index to read; None for the one that transformers reads.
            prefix: of the names to read.

        Raises:
            CheckpointError: no weight files, one is missing or damaged, or the index does not match them.
        """
        self.folder = folder
        self.prefix = prefix
        self.other_parts: list[str] = []
        self.entry, *self.other_entries = [entry] if entry is not None else _entries(folder)
        expected = _read_index(self.entry) if self.entry.suffix == ".json" else None
        files = [self.entry] if expected is None else sorted({folder / file for file in expected.values()})
        self.files = files
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file: dict[str, Path] = {}
        self._unpickled: tuple[Path, Mapping[str, Tensor]] | None = None
        for file in files:
            for full_name, shape in self._headers(file):
                name = full_name.removeprefix(prefix)
                if not full_name.startswith(prefix):
                    self.other_parts.append(full_name)
                    name = full_name  # for the checks of the files
                if name in self._file:
                    raise CheckpointError(
                        f"{folder}: {self._file[name].name} and {file.name} both hold {name}: the files are not of one "
                        f"model. {REMEDY}"
                    )
                self._file[name] = file
                if full_name.startswith(prefix):
                    self.shapes[name] = shape
        self.largest_file_bytes = max(file.stat().st_size for file in files)
        found = {name.removeprefix(prefix): name for name in expected or {}}
        absent = [full for name, full in found.items() if self._file.get(name) != folder / (expected or {})[full]]
        if expected is not None and absent:
            raise CheckpointError(
                f"{folder / expected[absent[0]]}: does not hold {absent[0]}, although the index lists it there "
                f"({len(absent)} such tensors). {REMEDY}"
            )

    def first_difference(self, other: WeightFiles, names: Sequence[str]) -> str | None:
        """The first of these tensors whose values differ in another set of weights; None if all are equal."""
        for name in names:
            if self.shapes[name] != other.shapes[name]:
                return name
            tensor = self.read(name)
            other_tensor = other.read(name)
            if tensor.dtype != other_tensor.dtype:
                tensor = tensor.float()
                other_tensor = other_tensor.float()
            if not torch.equal(tensor, other_tensor):
                return name
        return None

    def unread(self) -> Iterator[str]:
        """A note on files that look like weights but do not belong to any set."""
        known = {*self.files, *(self.folder / file for entry in self.other_entries for file in _listed(entry))}
        found = sorted({path for pattern in _WEIGHT_LIKE for path in self.folder.glob(pattern)} - known)
        if found:
            shown = ", ".join(path.name for path in found[:3]) + (f" and {len(found) - 3} more" if found[3:] else "")
            yield f"{shown}: ignored, {self.entry.name} was read"

    def read(self, name: str, slices: Sequence[slice] = ()) -> Tensor:
        """A tensor, or a slice of it, in the file's dtype. Only that slice is read into memory.

        Raises:
            CheckpointError: the file can no longer be read.
        """
        file = self._file[name]
        if file.suffix != ".safetensors":
            return self._pickled(file)[self.prefix + name][tuple(slices)]
        with _opened(file) as handle:
            full = self.prefix + name
            tensor: Tensor = handle.get_slice(full)[tuple(slices)] if slices else handle.get_tensor(full)
        return tensor

    def read_rows(self, name: str, rows: int, slices: Sequence[slice] = ()) -> Tensor:
        """A slice of a tensor truncated or extended to `rows` rows; new rows are the mean of the file's rows.

        As an output weight, a mean row gives a new id the mean of the other logits. By Jensen's inequality exp(mean) <=
        mean(exp), so n new rows beside N raise a loss by log(1 + n / N) at most.
        Source: Hewitt 2021, "Initializing new word embeddings for pretrained language models".
        """
        file_rows = self.shapes[name][0]
        selected = slices[0] if slices else slice(0, rows)
        columns = slices[1:]
        start = selected.start or 0
        stop = min(rows if selected.stop is None else selected.stop, rows)
        old = self.read(name, (slice(min(start, file_rows), min(stop, file_rows)), *columns))
        if stop <= file_rows:
            return old
        total = torch.zeros(self.read(name, (slice(0, 1), *columns)).shape[1:], dtype=torch.float64)
        for first in range(0, file_rows, _MEAN_ROWS):
            total += self.read(name, (slice(first, min(first + _MEAN_ROWS, file_rows)), *columns)).double().sum(0)
        new = (total / file_rows).to(old.dtype).expand(stop - max(start, file_rows), *total.shape)
        return torch.cat((old, new))

    def _headers(self, file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
        if file.suffix != ".safetensors":
            for name, tensor in self._pickled(file).items():
                yield name, tuple(tensor.shape)
            return
        with _opened(file) as handle:
            for name in handle.keys():  # noqa: SIM118  (a safetensors handle is not a dict)
                yield name, tuple(handle.get_slice(name).get_shape())

    def _pickled(self, file: Path) -> Mapping[str, Tensor]:
        """The tensors of a pytorch_model.bin, memory-mapped if its format allows that; caches the last file."""
        if self._unpickled is None or self._unpickled[0] != file:
            self._unpickled = None
            self._unpickled = (file, _unpickle(file))
        return self._unpickled[1]


def tensors_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in one safetensors file.

    Raises:
        CheckpointError: the file is damaged.
    """
    with _opened(file) as handle:
        for name in handle.keys():  # noqa: SIM118  (a safetensors handle is not a dict)
            yield name, handle.get_tensor(name)


def _entries(folder: Path) -> list[Path]:
    """The weight file or index of each set in a folder, in the order in which transformers looks for them."""
    names = [kind + end for kind in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]
    if found := [folder / name for name in names if (folder / name).is_file()]:
        return found
    raise CheckpointError(
        f"{folder}: holds no weights: expected model.safetensors or pytorch_model.bin, or an index of several files"
    )


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name; every file exists."""
    folder = index.parent
    weight_map = read_release_json(index, "it lists which file holds which weight").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map. {REMEDY}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"{index}: {name} is in {file!r}, which is not a file of this folder. {REMEDY}")
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file}: is missing; {index.name} lists it. {REMEDY}")
    return weight_map


def _listed(entry: Path) -> Iterator[str]:
    """The file names of a set of weights; only the index if it cannot be read."""
    yield entry.name
    if entry.suffix == ".json":
        try:
            weight_map = read_release_json(entry, "").get("weight_map")
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
        raise CheckpointError(f"{file}: damaged, or not a safetensors file: {error}. {REMEDY}") from None


def _unpickle(file: Path) -> Mapping[str, Tensor]:
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format of torch before 1.6 cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # any exception that a damaged or malicious file causes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{file}: damaged, or holds more than weights (which is never executed): {reason} {REMEDY}, "
            "as safetensors if there are any"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{file}: is not a dict of tensors. {REMEDY}")
    return state
