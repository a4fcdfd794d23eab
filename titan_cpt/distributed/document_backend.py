"""The kernel of attention inside documents: the flash kernel for several lengths, FlexAttention, or a boolean mask.

On a CPU attention is computed document by document, with `training.attention_backend` = "math" by a boolean mask. On a
GPU the default is the first of flash, flex and efficient that can be used; "fastest" measures them. A boolean mask
(cudnn, efficient, math) makes torch compute all pairs of positions. Context parallelism always has one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from titan_cpt.distributed.attention_backend import BACKENDS
from titan_cpt.distributed.attention_timing import Attend, AttentionChoice, AttentionShape, choose_kernel, time_ms
from titan_cpt.distributed.process_group import ProcessInfo
from titan_cpt.models.common.document_attention import DocumentBounds, Documents, KernelMask, document_attention
from titan_cpt.models.common.language_model import LanguageModel
from titan_cpt.models.common.layers import MakeKernelMasks, RotaryCausalAttention

KERNELS = ("flash", "flex", "cudnn", "efficient", "math")
CANDIDATES = ("flash", "flex", "efficient")  # in the order in which they are tried
_MEASURED_DOCUMENTS = 16  # equal documents in a sequence whose attention is measured


@dataclass(frozen=True)
class Circumstances:
    """What else of a run decides which kernels can be used.

    Attributes:
        cuda_graphs: steps are replayed, so that nothing may depend on the number of documents.
        context_parallel: a rank has a part of the queries.
        selective_uncompiled: activations are selected operator by operator, without torch.compile.
    """

    cuda_graphs: bool = False
    context_parallel: bool = False
    selective_uncompiled: bool = False


def choose_document_backend(
    requested: str,
    recorded: object,
    model: LanguageModel,
    shape: AttentionShape,
    process: ProcessInfo,
    circumstances: Circumstances,
    *,
    group: dist.ProcessGroup | None = None,
) -> AttentionChoice | None:
    """The kernel to use, equal on all ranks; None on a CPU and under context parallelism. Collective.

    Args:
        requested: one of `KERNELS`, "default" or "fastest".
        recorded: see `choose_kernel`.
        model: whose attention is measured; its weights are not used.

    Raises:
        ConfigError: the requested kernel cannot be used; the message says why.
    """
    on_cpu = process.device.type == "cpu"
    if circumstances.context_parallel or (on_cpu and requested != "math"):
        return None
    kernels = document_kernels_of(model, shape, process.device, circumstances)
    if requested == "default":
        requested = first_that_works(kernels, shape, process.device)
    candidates = ("math",) if on_cpu else CANDIDATES
    return choose_kernel(requested, recorded, kernels, shape, process, candidates=candidates, group=group)


def document_kernels_of(
    model: LanguageModel, shape: AttentionShape, device: torch.device, circumstances: Circumstances
) -> dict[str, Attend]:
    """`KERNELS` for `choose_kernel`, over equal documents; one that `why_not` excludes raises a RuntimeError."""
    windows = _windows(model)
    return {name: _MeasuredKernel(name, windows, why_not(name, shape, device, circumstances)) for name in KERNELS}


def first_that_works(kernels: Mapping[str, Attend], shape: AttentionShape, device: torch.device) -> str:
    """The first of `CANDIDATES` that computes this attention on this device, or else "math"."""
    for name in CANDIDATES:
        if not isinstance(time_ms(kernels[name], shape, device, repetitions=1), str):
            return name
    return "math"


def why_not(name: str, shape: AttentionShape, device: torch.device, circumstances: Circumstances) -> str | None:
    """Why a kernel cannot be used, as far as that is known without trying it; None: it may be tried."""
    if name == "flash":
        return _why_not_flash(shape, device, circumstances)
    return _why_not_flex(shape, device, circumstances) if name == "flex" else None


def _why_not_flash(shape: AttentionShape, device: torch.device, circumstances: Circumstances) -> str | None:
    if shape.dtype not in (torch.bfloat16, torch.float16):
        return "the flash kernel computes in bfloat16 only"
    if shape.head_width % 8 or shape.head_width > 256:
        return f"the flash kernel needs heads of at most 256 features, a multiple of 8, not {shape.head_width}"
    if circumstances.cuda_graphs:
        return "its launches depend on the documents, and training.cuda_graphs replays those of one batch"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return "the flash kernel needs an NVIDIA GPU of compute capability 8.0"
    return None


def _why_not_flex(shape: AttentionShape, device: torch.device, circumstances: Circumstances) -> str | None:
    if device.type == "cpu":
        return "FlexAttention has no backward pass on a CPU"
    if importlib.util.find_spec("triton") is None:
        return "FlexAttention needs Triton, which comes with torch's CUDA builds"
    if shape.head_width < 16:
        return f"FlexAttention needs heads of at least 16 features, not {shape.head_width}"
    if circumstances.selective_uncompiled:
        return (
            'FlexAttention is not compiled within activation_checkpoint.selective_ac_option = "op" unless '
            "compile.enable is true"
        )
    return None


def set_document_backend(models: Iterable[LanguageModel], backend: str) -> None:
    """Compute attention inside documents with one of `KERNELS` only, whether or not the models are compiled."""
    for model in models:
        model.make_kernel_masks = _maker(backend, _windows(model))
        for attention in model.attentions():
            core = cast(RotaryCausalAttention, attention.core)
            core.document_backend = BACKENDS[backend] if model.make_kernel_masks is None else None


def _windows(model: LanguageModel) -> tuple[int | None, ...]:
    """The sliding-window sizes of the layers, each once."""
    return tuple(dict.fromkeys(cast(RotaryCausalAttention, each.core).window for each in model.attentions()))


def _maker(backend: str, windows: Sequence[int | None]) -> MakeKernelMasks | None:
    if backend not in ("flash", "flex"):
        return None
    from titan_cpt.models.common import document_kernels  # imports torch's compiler

    def make_masks(starts_BL: Tensor, bounds: DocumentBounds | None) -> Mapping[int | None, KernelMask]:
        return {window: document_kernels.kernel_mask(backend, window, starts_BL, bounds) for window in windows}

    return make_masks


class _MeasuredKernel:
    """Attention over equal documents with one kernel, whose masks are made once, as for all layers of a forward pass.

    It computes one layer of each sliding-window size, and returns the sum.

    Args:
        problem: why the kernel cannot be used: a RuntimeError says so.
    """

    def __init__(self, name: str, windows: Sequence[int | None], problem: str | None) -> None:
        self.name = name
        self.windows = windows
        self.problem = problem
        self.documents: Documents | None = None

    def __call__(self, q_BNLH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor) -> Tensor:
        """out_BNLH."""
        if self.problem is not None:
            raise RuntimeError(self.problem)
        if self.documents is None:
            starts_BL, bounds = equal_documents(q_BNLH, _MEASURED_DOCUMENTS)
            make_masks = _maker(self.name, self.windows)
            masks = {} if make_masks is None else make_masks(starts_BL, bounds)
            self.documents = Documents(starts_BL, kernel_masks=masks)
        backend = None if self.documents.kernel_masks else BACKENDS[self.name]
        outputs = [
            document_attention(q_BNLH, k_BKLH, v_BKLH, documents=self.documents, window=window, backend=backend)
            for window in self.windows
        ]
        return sum(outputs[1:], start=outputs[0])


def equal_documents(q_BNLH: Tensor, documents: int) -> tuple[Tensor, DocumentBounds]:
    """starts_BL of sequences of equal documents, on the device of the queries, and their bounds."""
    sequences, _, length, _ = q_BNLH.shape
    each = max(1, length // documents)
    starts_L = torch.arange(length, dtype=torch.int32, device=q_BNLH.device) // each * each
    return starts_L.expand(sequences, -1), DocumentBounds(sequences * -(-length // each), max(2, each))
