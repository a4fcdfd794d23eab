"""The training loss: a sum over tokens, so that gradient accumulation and parallelism do not change it.

The caller scales the sum by 1 / the global batch's token count. `fused_linear_cross_entropy` computes the output layer
(head) and the loss in one operation. If tensor parallelism splits the head's rows over ranks, or under pipeline
parallelism, `summed_cross_entropy` computes the loss from logits.

Shape letters: B sequences, L positions, D width, V vocabulary, T = B x L tokens, C tokens of one chunk.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from titan_cpt.data.batch import NO_TARGET
from titan_cpt.models.common.loss_chunks import LOGITS_CHUNK, logits_chunk
from titan_cpt.models.common.ops import linear, multiply

CPU_CHUNK_ELEMENTS = 2**18
"""Number of fp32 logits at a time on a CPU: 1 MiB, which fits into its cache and takes half the time of 16 MiB."""
CHUNK_ELEMENTS = 2**24
"""Number of fp32 logits at a time on other devices: 64 MiB, for few kernel launches."""


@dataclass(frozen=True)
class SourceSums:
    """Sums over the targets of each source, to which the loss functions add while they compute the loss.

    Attributes:
        sums_S2: loss in nats and number of targets of every source, float64, on the device; changed in place.
        sources_B: number of each sequence's source, in [0, S).
    """

    sums_S2: Tensor
    sources_B: Tensor

    @torch.no_grad()
    def add(self, losses_T: Tensor, targets_BL: Tensor) -> None:
        """Add the losses of the tokens of a micro-batch. A source's NaN does not spread to the others."""
        counted_BL = targets_BL >= 0
        losses_B = losses_T.view_as(targets_BL).sum(dim=1, dtype=torch.float64)
        rows_B2 = torch.stack([losses_B, counted_BL.sum(dim=1, dtype=torch.float64)], dim=1)
        numbers_S = torch.arange(len(self.sums_S2), device=self.sources_B.device)
        self.sums_S2.add_(rows_B2.where((self.sources_B == numbers_S[:, None])[:, :, None], 0.0).sum(dim=1))


def fused_linear_cross_entropy(
    x_BLD: Tensor,
    weight_VD: Tensor,
    *,
    targets_BL: Tensor,
    scale: float,
    compiled: bool = False,
    by_source: SourceSums | None = None,
) -> Tensor:
    """`summed_cross_entropy` of the logits x W^T, times `scale`, without materializing the logits of all tokens.

    The loss is a scalar, so the gradients of x and W are known up to a factor once a chunk's logits are computed: they
    are computed in the forward pass, chunk by chunk, without recomputation. On a GPU the gradient of W is computed and
    summed in fp32. On a CPU each chunk's share is rounded to the dtype of W; several shares are summed in fp32.
    Source of the idea: Hsu et al. 2024 (Liger Kernel), arXiv:2410.10989, section 3.2.

    Args:
        x_BLD: input of the head, in the dtype of the weight.
        weight_VD: the head's weight, not sharded.
        targets_BL: ids of the target tokens, int64, in [0, V); the loss ignores positions with a negative one.
        scale: factor of the loss, such as 1 / tokens of the global batch.
        compiled: compile the softmax with torch.compile, on CUDA only.
        by_source: sums to which the losses are added, not scaled.

    Returns:
        A scalar in fp32.
    """
    softmax: _Softmax = _softmax
    if compiled and x_BLD.is_cuda:  # on a CPU the compiled one is slower
        softmax = _compiled_softmax()
    total: Tensor = _FusedLinearCrossEntropy.apply(x_BLD, weight_VD, targets_BL, scale, softmax, by_source)  # type: ignore[no-untyped-call]
    return total


def summed_cross_entropy(logits_BLV: Tensor, targets_BL: Tensor, *, by_source: SourceSums | None = None) -> Tensor:
    """Sum over all tokens of -log softmax(logits)[target], in nats; a scalar in fp32, whatever the dtype of the logits.

    Positions with a negative target do not count. Padding rows of the vocabulary are rows like any other; they are
    never targets, so the model learns to give them no probability. One chunk of tokens at a time is upcast to fp32,
    forward and backward; the gradient has the dtype of the logits, rounded once. Logits that tensor parallelism shards
    over the vocabulary go through torch's own cross-entropy, under `loss_parallel`.

    Args:
        logits_BLV: scores, in any floating dtype; a DTensor only within `loss_parallel`, which must span backward too.
        targets_BL: ids of the target tokens, int64, in [0, V); negative where there is none (NO_TARGET).
        by_source: sums to which the losses are added.

    Returns:
        A plain 0-dimensional tensor.
    """
    logits_TV = logits_BLV.flatten(0, 1)
    targets_T = targets_BL.flatten()
    if isinstance(logits_TV, DTensor):
        losses_T = F.cross_entropy(logits_TV.float(), targets_T, reduction="none", ignore_index=NO_TARGET)
        total = losses_T.sum()
    else:
        total, losses_T = _SummedCrossEntropy.apply(logits_TV, targets_T)  # type: ignore[no-untyped-call]
    if by_source is not None:
        by_source.add(losses_T.full_tensor() if isinstance(losses_T, DTensor) else losses_T, targets_BL)
    return total.full_tensor() if isinstance(total, DTensor) else total


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients of x and the head's weight in forward; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BLD: Tensor,
        weight_VD: Tensor,
        targets_BL: Tensor,
        scale: float,
        softmax: "_Softmax",
        by_source: SourceSums | None,
    ) -> Tensor:
        x_TD = x_BLD.flatten(0, 1)
        targets_T = targets_BL.flatten()
        chunk = logits_chunk(_memory_of(x_BLD.device)) if x_BLD.is_cuda else LOGITS_CHUNK
        chunks = -(-x_TD.shape[0] * weight_VD.shape[0] // chunk)
        losses = []
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        grad_x_TD = torch.empty_like(x_TD) if needs_x else None
        grad_VD: Tensor | None = None
        first = 0
        for x_CD, targets_C in zip(x_TD.tensor_split(chunks), targets_T.tensor_split(chunks), strict=True):
            losses_C, grad_CV = softmax(linear(x_CD, weight_VD), targets_C, scale)
            losses.append(losses_C)
            if grad_x_TD is not None:
                multiply(grad_CV, weight_VD, out=grad_x_TD[first : first + len(x_CD)])
            if needs_weight and grad_CV.is_cuda:
                grad_VD = _add_product(grad_VD, grad_CV.t(), x_CD)
            elif needs_weight:
                share_VD = _share_of_weight(grad_CV, x_CD)
                if grad_VD is None:
                    grad_VD = share_VD.float() if chunks > 1 else share_VD
                else:
                    grad_VD += share_VD
            first += len(x_CD)
        ctx.gradients = grad_x_TD.view_as(x_BLD) if grad_x_TD is not None else None, grad_VD
        losses_T = torch.cat(losses)
        if by_source is not None:
            by_source.add(losses_T, targets_BL)
        return losses_T.sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        grad_x_BLD, grad_VD = (None if gradient is None else gradient.mul_(grad_total) for gradient in gradients)
        return grad_x_BLD, grad_VD, None, None, None, None


def _share_of_weight(grad_CV: Tensor, x_CD: Tensor) -> Tensor:
    """A chunk's share of the weight's gradient on a CPU, [V, D].

    There a transposed left operand can double the time of a matrix product, so the input, the smaller of the two
    operands, is transposed instead.
    """
    return multiply(x_CD.t().contiguous(), grad_CV).t()


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a b in fp32 on a GPU, in place if there is a total; the product is not rounded to a's dtype."""
    if a.dtype == torch.float32:
        return a @ b if total is None else total.addmm_(a, b)
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    if _adds_to_float32(a.device, a.dtype):
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return total.add_(torch.mm(a, b, out_dtype=torch.float32))


@functools.cache
def _adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of reduced precision to an fp32 matrix; older ones want one dtype for all."""
    a = torch.ones(16, 16, device=device, dtype=dtype)
    total = torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return bool((total == 1 + 16).all())


@functools.cache
def _memory_of(device: torch.device) -> int:
    """A GPU's memory in bytes."""
    return torch.cuda.get_device_properties(device).total_memory


_Softmax = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


def _softmax(logits_CV: Tensor, targets_C: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Every token's loss in fp32; the gradient of the scaled sum overwrites the logits."""
    losses_C = torch.empty(logits_CV.shape[0], dtype=torch.float32, device=logits_CV.device)
    for chunk in _chunks(logits_CV):
        fp32_CV = logits_CV[chunk].float()
        targets_C1 = targets_C[chunk, None]
        ignored_C1 = targets_C1 < 0
        ids_C1 = targets_C1.clamp(min=0)
        largest_C1 = fp32_CV.amax(dim=-1, keepdim=True)
        target_logits_C1 = fp32_CV.gather(-1, ids_C1)
        powers_CV = fp32_CV.sub_(largest_C1).exp_()  # only once: it costs as much as all other operations here
        norms_C1 = powers_CV.sum(dim=-1, keepdim=True)
        losses_C1 = largest_C1 + norms_C1.log() - target_logits_C1
        losses_C[chunk] = losses_C1.masked_fill_(ignored_C1, 0.0).squeeze(-1)
        grad_CV = powers_CV.mul_((scale / norms_C1).masked_fill_(ignored_C1, 0.0))
        if grad_CV.is_cuda and torch.are_deterministic_algorithms_enabled():
            # The deterministic scatter_add_ copies a table from the host, which a CUDA graph cannot capture.
            one_hot_CV = torch.arange(grad_CV.shape[1], device=grad_CV.device) == targets_C1
            logits_CV[chunk] = grad_CV.add_(one_hot_CV, alpha=-scale)
        else:
            minus_C1 = grad_CV.new_full(targets_C1.shape, -scale).masked_fill_(ignored_C1, 0.0)
            logits_CV[chunk] = grad_CV.scatter_add_(-1, ids_C1, minus_C1)
    return losses_C, logits_CV


def _softmax_for_compile(logits_CV: Tensor, targets_C: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`_softmax` without a loop over chunks: torch.compile fuses it into few kernels without an fp32 copy of logits."""
    fp32_CV = logits_CV.float()
    log_norms_C1 = fp32_CV.logsumexp(dim=-1, keepdim=True)
    counted_C1 = targets_C[:, None] >= 0
    losses_C1 = log_norms_C1 - fp32_CV.gather(-1, targets_C[:, None].clamp(min=0))
    one_hot_CV = torch.arange(logits_CV.shape[1], device=logits_CV.device) == targets_C[:, None]
    grad_CV = torch.where(counted_C1, ((fp32_CV - log_norms_C1).exp() - one_hot_CV.float()) * scale, 0.0)
    return torch.where(counted_C1, losses_C1, 0.0).squeeze(-1), grad_CV.to(logits_CV.dtype)


@functools.cache
def _compiled_softmax() -> "_Softmax":
    compiled = torch.compile(_softmax_for_compile, dynamic=False)

    def softmax(logits_CV: Tensor, targets_C: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        # A tensor: a number would be compiled in, anew for each batch size of a ramp and each step of packed documents.
        on_device = torch.full((), scale, dtype=torch.float32, device=logits_CV.device)
        result: tuple[Tensor, Tensor] = compiled(logits_CV, targets_C, on_device)
        return result

    return softmax


class _SummedCrossEntropy(torch.autograd.Function):
    """Saves the logits and one fp32 number per token, and recomputes the softmax in backward."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
        log_norms_T = torch.empty(logits_TV.shape[0], dtype=torch.float32, device=logits_TV.device)
        losses_T = torch.empty_like(log_norms_T)
        for chunk in _chunks(logits_TV):
            chunk_CV = logits_TV[chunk].float()
            log_norms_T[chunk] = chunk_CV.logsumexp(dim=-1)
            ids_C1 = targets_T[chunk, None].clamp(min=0)
            losses_C = log_norms_T[chunk] - chunk_CV.gather(-1, ids_C1).squeeze(-1)
            losses_T[chunk] = losses_C.masked_fill_(targets_T[chunk] < 0, 0.0)
        ctx.save_for_backward(logits_TV, targets_T, log_norms_T)
        ctx.mark_non_differentiable(losses_T)
        return losses_T.sum(), losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor, None]:
        logits_TV, targets_T, log_norms_T = ctx.saved_tensors
        grad_TV = torch.empty_like(logits_TV)
        for chunk in _chunks(logits_TV):
            softmax_CV = (logits_TV[chunk].float() - log_norms_T[chunk, None]).exp_()
            targets_C1 = targets_T[chunk, None]
            softmax_CV.scatter_add_(-1, targets_C1.clamp(min=0), softmax_CV.new_full(targets_C1.shape, -1.0))
            grad_TV[chunk] = softmax_CV.mul_(grad_total.expand_as(targets_C1).masked_fill(targets_C1 < 0, 0.0))
        return grad_TV, None


def _chunks(logits_TV: Tensor) -> list[slice]:
    """Slices of tokens whose fp32 logits fit into one chunk."""
    tokens, vocabulary = logits_TV.shape
    elements = CPU_CHUNK_ELEMENTS if logits_TV.device.type == "cpu" else CHUNK_ELEMENTS
    step = max(1, elements // vocabulary)
    return [slice(start, start + step) for start in range(0, tokens, step)]
