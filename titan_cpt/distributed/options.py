"""Options of the parallelism techniques that are applied to a model, apart from the parallelism degrees."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Float8Options:
    """Float8 training of linear layers with torchao.

    Attributes:
        recipe: torchao's scaling recipe: "tensorwise", "rowwise" or "rowwise_with_gw_hp".
        fsdp_all_gather: FSDP2 gathers weights in float8, one byte per parameter; with the tensorwise recipe only.
        filter_fqns: a layer whose name contains one of these is not converted.
    """

    recipe: str
    fsdp_all_gather: bool
    filter_fqns: tuple[str, ...]


@dataclass(frozen=True)
class ParallelOptions:
    """How `parallelize` treats a model, apart from the parallelism degrees.

    Attributes:
        precision: dtype of computation and of gathered parameters; gradients are reduced in float32.
        recompute: activation checkpointing mode: "none", "full", "selective" or "memory_budget".
        selection: under "selective": "op" (per operator), or n to checkpoint every n-th block.
        memory_budget: under "memory_budget": fraction of the activation memory that may be used.
        compiled: apply torch.compile to each block.
        ring_attention: context-parallel ranks pass keys and values around a ring instead of all-gathering them.
        async_tp: overlap tensor-parallel communication with matrix products.
        offloaded: keep parameters, gradients and optimizer state in host memory.
        float8: settings of float8 training; None: no layer is converted.
    """

    precision: torch.dtype
    recompute: str = "none"
    selection: str = "op"
    memory_budget: float = 0.5
    compiled: bool = False
    ring_attention: bool = False
    async_tp: bool = False
    offloaded: bool = False
    float8: Float8Options | None = None
