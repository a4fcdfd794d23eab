"""The training loss: a sum over tokens, so that neither accumulation, ranks nor layout can change it.

Whoever takes a step divides by the global batch's token count. Shape letters: B sequences, L positions, V vocabulary,
T = B x L tokens, C tokens of one chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

CPU_CHUNK_ELEMENTS = 2**18
"""Logits that are held in fp32 at a time on a CPU: 1 MiB, which stays in its cache (half the time of 16 MiB)."""
CHUNK_ELEMENTS = 2**24
"""The same on other devices: 64 MiB, which keeps the number of kernel launches small."""


def summed_cross_entropy(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """Sum over all tokens of -log softmax(logits)[target], in nats; a scalar in fp32, whatever the dtype of the logits.

    Every position counts. The padding rows of the vocabulary take part as any other row: no target names them, so that
    the model learns to give them no probability. A chunk of tokens is upcast at a time, forward and backward, so no
    fp32 copy of bf16 logits is ever whole; the gradient comes in the dtype of the logits, rounded once. Logits that
    tensor parallelism left sharded over the vocabulary go through torch's own cross-entropy, under `loss_parallel`.

    Args:
        logits_BLV: scores, in any floating dtype; a DTensor only within `loss_parallel`, which must span backward too.
        targets_BL: ids of the right tokens, int64, in [0, V).

    Returns:
        A plain tensor without dimensions.
    """
    logits_TV, targets_T = logits_BLV.flatten(0, 1), targets_BL.flatten()
    if isinstance(logits_TV, DTensor):
        total = F.cross_entropy(logits_TV.float(), targets_T, reduction="sum")
    else:
        total = _SummedCrossEntropy.apply(logits_TV, targets_T)  # type: ignore[no-untyped-call]
    return total.full_tensor() if isinstance(total, DTensor) else total


class _SummedCrossEntropy(torch.autograd.Function):
    """Keeps the logits as they came and one fp32 number a token; works the softmax out again in backward."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor) -> Tensor:
        log_norms_T = torch.empty(logits_TV.shape[0], dtype=torch.float32, device=logits_TV.device)
        losses_T = torch.empty_like(log_norms_T)
        for chunk in _chunks(logits_TV):
            chunk_CV = logits_TV[chunk].float()
            log_norms_T[chunk] = chunk_CV.logsumexp(dim=-1)
            losses_T[chunk] = log_norms_T[chunk] - chunk_CV.gather(-1, targets_T[chunk, None]).squeeze(-1)
        ctx.save_for_backward(logits_TV, targets_T, log_norms_T)
        return losses_T.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None]:
        logits_TV, targets_T, log_norms_T = ctx.saved_tensors
        grad_TV = torch.empty_like(logits_TV)
        for chunk in _chunks(logits_TV):
            softmax_CV = (logits_TV[chunk].float() - log_norms_T[chunk, None]).exp_()
            softmax_CV.scatter_add_(-1, targets_T[chunk, None], softmax_CV.new_full((softmax_CV.shape[0], 1), -1.0))
            grad_TV[chunk] = softmax_CV.mul_(grad_total)
        return grad_TV, None


def _chunks(logits_TV: Tensor) -> list[slice]:
    tokens, vocabulary = logits_TV.shape
    elements = CPU_CHUNK_ELEMENTS if logits_TV.device.type == "cpu" else CHUNK_ELEMENTS
    step = max(1, elements // vocabulary)
    return [slice(start, start + step) for start in range(0, tokens, step)]
