"""The kernel of scaled dot-product attention (SDPA): a chosen one, or the fastest of those that this device has.

torch chooses by fixed rules. Which kernel is fastest depends on the device, the shape and the dtype, so "fastest"
measures forward and backward of one layer's attention once, on rank 0, and all ranks use its choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import cast

import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend

from titan_cpt.distributed.attention_timing import Attend, AttentionChoice, AttentionShape, choose_kernel
from titan_cpt.distributed.process_group import ProcessInfo
from titan_cpt.models.common.language_model import LanguageModel
from titan_cpt.models.common.layers import RotaryCausalAttention

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_CANDIDATES = {"cuda": ("cudnn", "flash", "efficient"), "cpu": ("flash", "math")}  # math needs B N L L numbers


def set_attention_backend(models: Iterable[LanguageModel], backend: str) -> None:
    """Compute the attention of these models with one of `BACKENDS` only, whether or not they are compiled."""
    for model in models:
        for block_attention in model.attentions():
            cast(RotaryCausalAttention, block_attention.core).backend = BACKENDS[backend]


def choose_attention_backend(
    requested: str,
    recorded: object,
    model: LanguageModel,
    shape: AttentionShape,
    process: ProcessInfo,
    *,
    group: dist.ProcessGroup | None = None,
) -> AttentionChoice:
    """The backend to use, equal on all ranks; collective. See `choose_kernel`.

    Args:
        requested: one of `BACKENDS`, or "fastest".
        model: whose attention is measured; its weights are not used.
    """
    candidates = _CANDIDATES[process.device.type]
    kernels = attention_kernels_of(model)
    return choose_kernel(requested, recorded, kernels, shape, process, candidates=candidates, group=group)


def attention_kernels_of(model: LanguageModel) -> dict[str, Attend]:
    """`BACKENDS` for `choose_kernel`; each computes one layer of every sliding-window size."""
    cores = [cast(RotaryCausalAttention, each.core) for each in model.attentions()]
    by_window = {core.window: core for core in reversed(cores)}
    return {name: partial(_attend, tuple(by_window.values()), backend) for name, backend in BACKENDS.items()}


def _attend(cores: Sequence[RotaryCausalAttention], backend: SDPBackend, *inputs: Tensor) -> Tensor:
    """The sum of the outputs of these layers."""
    outputs = []
    for core in cores:
        before = core.backend
        core.backend = backend
        try:
            outputs.append(core.attend(*inputs))
        finally:
            core.backend = before
    return sum(outputs[1:], start=outputs[0])
