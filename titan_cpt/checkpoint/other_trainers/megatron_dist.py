"""The tensors of Megatron-LM's distributed checkpoints (--ckpt-format torch_dist, its default): a DCP folder.

Tensors have the shape of the whole model; those of a block are stacked over all layers, or are saved layer by layer.
Source: core/dist_checkpointing, core/transformer/transformer_block.py of core_v0.16.1.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from titan_cpt.checkpoint.other_trainers.dcp_files import DcpFiles
from titan_cpt.checkpoint.other_trainers.megatron_names import BLOCKS, EMBEDDING, HEAD
from titan_cpt.errors import CheckpointError


class DistTensors:
    """The tensors of a checkpoint whose names begin with a prefix, layer by layer.

    Args:
        files: the checkpoint.
        prefix: "" for the weights, such as "optimizer.state.exp_avg." for a moment.
        layers: of the model.
    """

    def __init__(self, files: DcpFiles, prefix: str, layers: int) -> None:
        self._files = files
        self._prefix = prefix
        self._layers = layers
        self._stored = dict(self._find())

    def _find(self) -> Iterator[tuple[str, tuple[str, int | None]]]:
        """Name in the model -> name in the files, and the layer in a stacked tensor."""
        for key in self._files.tensors:
            name = key.removeprefix(self._prefix)
            if not key.startswith(self._prefix) or not name.startswith((BLOCKS, "decoder.final", EMBEDDING, HEAD)):
                continue
            if name.startswith(BLOCKS) and not name.removeprefix(BLOCKS).partition(".")[0].isdigit():
                for layer in range(self._layers):
                    yield f"{BLOCKS}{layer}.{name.removeprefix(BLOCKS)}", (key, layer)
            else:
                yield name, (key, None)

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of the whole model."""
        key, layer = self._stored[name]
        shape = self._files.tensors[key].shape
        return shape if layer is None else shape[1:]

    def read(self, name: str) -> Tensor:
        """A tensor of the whole model; of a stacked one only this layer is read."""
        shape = self.shape(name)
        return self.read_part(name, (0,) * len(shape), shape)

    def read_part(self, name: str, at: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A rectangular part of a tensor of the whole model."""
        key, layer = self._stored[name]
        if layer is None:
            return self._files.read_part(key, at, shape)
        layers = self._files.tensors[key].shape[0]
        if layers != self._layers:
            raise CheckpointError(f"{self._files.folder}: {key} has {layers} layers, but the model has {self._layers}")
        return self._files.read_part(key, (layer, *at), (1, *shape))[0]

    def key_of(self, name: str) -> str:
        """The name in the files of the tensor that has this one."""
        return self._stored[name][0]

    def where(self, name: str) -> str:
        """A tensor's name in the files."""
        key, layer = self._stored[name]
        return key if layer is None else f"{key}[{layer}]"
