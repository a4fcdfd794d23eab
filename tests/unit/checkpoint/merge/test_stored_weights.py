"""Rows of weights in sharded checkpoints, written here with safetensors only."""

import json
from itertools import pairwise

import pytest
import torch
from releases import SPECS
from safetensors.torch import save_file

from titan_cpt.checkpoint.hf_release import weight_shapes
from titan_cpt.checkpoint.merge.stored_weights import StoredWeights
from titan_cpt.errors import CheckpointError

SPEC = SPECS["llama"]
WEIGHTS = {
    name: torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    for name, shape in weight_shapes(SPEC).items()
}


def write(folder, cuts, *, without=(), part="model"):
    """The files of a checkpoint whose weights are cut at these rows and columns; a block goes to each of two files."""
    files, index = ({}, {}), {}
    for name, tensor in WEIGHTS.items():
        parts = []
        rows = [0, *(at for at in cuts[0] if at < tensor.shape[0]), tensor.shape[0]]
        columns = [0, *cuts[1], tensor.shape[1]] if tensor.dim() > 1 else [None, None]
        for top, bottom in pairwise(rows):
            for left, right in pairwise(columns):
                at = [top] if left is None else [top, left]
                block = tensor[top:bottom] if left is None else tensor[top:bottom, left:right]
                number = len(parts) % 2
                key = f"{part}.{name}" + (f"@{','.join(map(str, at))}" if any(at) else "")
                files[number][key] = block.contiguous()
                parts.append({"at": at, "shape": list(block.shape), "file": f"rank-{number:05d}-0.safetensors"})
        if name not in without:
            index[f"{part}.{name}"] = {"dtype": "F32", "shape": list(tensor.shape), "parts": parts}
    folder.mkdir()
    for number, tensors in enumerate(files):
        save_file(tensors or {"none": torch.zeros(1)}, folder / f"rank-{number:05d}-0.safetensors")
    (folder / "index.json").write_text(json.dumps({"tensors": index}))
    return folder


@pytest.mark.parametrize("cuts", [((), ()), ((1, 30, 65), ()), ((10,), (17, 40)), ((5, 6, 7, 100), (1,))])
def test_rows_are_read_from_every_sharding(cuts, tmp_path):
    """Whole weights, their first and last rows, and rows across the borders of shards; also cut in both dimensions."""
    weights = StoredWeights(write(tmp_path / "checkpoint", cuts), SPEC)

    for name, tensor in WEIGHTS.items():
        for rows in (slice(0, len(tensor)), slice(0, 1), slice(len(tensor) - 1, len(tensor)), slice(3, 33)):
            assert torch.equal(weights.read(name, rows), tensor[rows])


def test_weights_that_are_not_the_model_s_are_refused(tmp_path):
    """A missing weight, and a folder that has only the weights of another part."""
    with pytest.raises(CheckpointError, match=r"final_norm\.weight: missing, the model has \[64\]"):
        StoredWeights(write(tmp_path / "one", ((), ()), without=["final_norm.weight"]), SPEC)
    with pytest.raises(CheckpointError, match="problems"):
        StoredWeights(write(tmp_path / "other", ((), ()), part="average"), SPEC)
    assert StoredWeights(tmp_path / "other", SPEC, "average").read("final_norm.weight", slice(0, 64)).sum() == 2016


def test_a_file_that_went_away_is_named(tmp_path):
    """After the index was read."""
    weights = StoredWeights(write(tmp_path / "checkpoint", ((), ())), SPEC)
    (tmp_path / "checkpoint" / "rank-00000-0.safetensors").unlink()

    with pytest.raises(CheckpointError, match=r"rank-00000-0\.safetensors: final_norm\.weight cannot be read"):
        weights.read("final_norm.weight", slice(0, 1))
