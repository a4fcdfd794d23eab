"""Averages written into checkpoints by hand, without the code that trains or loads.

The format: tensors `average.<parameter>` in float32 beside `model.<parameter>`, and the manifest's entry `averaging`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from titan_cpt.checkpoint import manifest

ENTRY: dict[str, Any] = {"kind": "mean", "size": 2, "every": 4, "snapshots": [4, 8], "count": 2, "kept": 0}
_FILE = "rank-00000-9.safetensors"  # no rank writes so many


def mean_of(snapshots: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of weights in float64, rounded once to float32."""
    return {
        name: (sum(each[name].double() for each in snapshots) / len(snapshots)).float()  # type: ignore[union-attr]
        for name in snapshots[0]
    }


def add_average(folder: Path, average: Mapping[str, Tensor], entry: Mapping[str, Any] = ENTRY) -> Path:
    """Write an average into a checkpoint; returns the folder."""
    save_file({f"average.{name}": tensor.contiguous() for name, tensor in average.items()}, folder / _FILE)
    index = json.loads((folder / "index.json").read_text())
    for name, tensor in average.items():
        shape = list(tensor.shape)
        part = {"at": [0] * len(shape), "shape": shape, "file": _FILE}
        index["tensors"][f"average.{name}"] = {"dtype": "F32", "shape": shape, "parts": [part]}
    (folder / "index.json").write_text(json.dumps(index))
    return _with_new_manifest(folder, averaging=dict(entry))


def forget_average(folder: Path) -> Path:
    """Remove the average from what a manifest says, as if the run had not averaged; returns the folder."""
    record = json.loads((folder / "manifest.json").read_text())
    manifest.write(folder, {key: value for key, value in record.items() if key not in ("files", "format", "averaging")})
    return folder


def replace_weights(folder: Path, weights: Mapping[str, Tensor]) -> Path:
    """Put other weights in the place of the model's, in a checkpoint that one process wrote; returns the folder."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        tensors |= {f"model.{name}": weights[name] for name in weights if f"model.{name}" in tensors}
        save_file(tensors, path, metadata={"format": "pt"})
    return _with_new_manifest(folder)


def distort(weights: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Other weights of the same shapes, near the given ones."""
    generator = torch.Generator().manual_seed(seed)
    return {name: weight + 0.01 * torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}


def _with_new_manifest(folder: Path, **entries: Any) -> Path:
    record = json.loads((folder / "manifest.json").read_text())
    manifest.write(folder, {key: value for key, value in record.items() if key not in ("files", "format")} | entries)
    return folder
