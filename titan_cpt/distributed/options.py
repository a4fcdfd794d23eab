"""Options of precision, memory and parallelism techniques, except the parallelism degrees (see parallel_dims.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Float8Options:
    """Float8 training of linear layers with torchao.

    Attributes:
        recipe: torchao's scaling recipe: "tensorwise", "rowwise" or "rowwise_with_gw_hp".
        fsdp_all_gather: FSDP2 all-gathers weights in float8, one byte per parameter; only with recipe "tensorwise".
        filter_fqns: a layer whose name contains one of these is not converted.
    """

    recipe: str
    fsdp_all_gather: bool
    filter_fqns: tuple[str, ...]


@dataclass(frozen=True)
class ParallelOptions:
    """Options of `parallelize`, except the parallelism degrees.

    Attributes:
        precision: dtype of computation and of gathered parameters; gradients are reduced in float32.
        recompute: activation checkpointing mode: "none", "full", "selective" or "memory_budget".
        selection: for "selective": "op" (per operator), or "n", an integer, to checkpoint every n-th block.
        memory_budget: for "memory_budget": fraction of the activation memory that may be used, 0 to 1.
        compiled: apply torch.compile.
        compile_scope: "block" to compile each block, "model" to compile all but the head as one graph.
        compile_mode: mode of torch.compile.
        compiled_versions: how often a block may be compiled, for other shapes and settings.
        ring_attention: context-parallel ranks pass keys and values around a ring instead of all-gathering them.
        async_tp: overlap tensor-parallel communication with matrix products.
        offloaded: keep parameters, gradients and optimizer state in host memory.
        float8: settings of float8 training, or None to train without it.
    """

    precision: torch.dtype
    recompute: str = "none"
    selection: str = "op"
    memory_budget: float = 0.5
    compiled: bool = False
    compile_scope: str = "block"
    compile_mode: str = "default"
    compiled_versions: int = 8
    ring_attention: bool = False
    async_tp: bool = False
    offloaded: bool = False
    float8: Float8Options | None = None
