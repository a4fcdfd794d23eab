"""Settings that a CPU does not support. The plan accepts them: it may be made on another machine than the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from titan_cpt.config.schema import Config
from titan_cpt.errors import PlanError


@dataclass(frozen=True)
class CPURule:
    """A setting that is refused on a CPU; the attributes are those of `Rule`."""

    refused: str
    because: str
    problem: Callable[[Config], str | None]


def check_device(config: Config, device: str) -> None:
    """Refuse settings that this kind of device does not support.

    Args:
        device: "cpu" or "cuda".

    Raises:
        PlanError: the message lists all such settings.
    """
    problems = [rule.problem(config) for rule in CPU_RULES] if device == "cpu" else []
    found = [problem for problem in problems if problem]
    if found:
        raise PlanError("\n".join(["not supported on a CPU:", *(f"  - {problem}" for problem in found)]))


def _async_tp(config: Config) -> str | None:
    if not config.parallelism.enable_async_tensor_parallel:
        return None
    return (
        "parallelism.enable_async_tensor_parallel: needs symmetric memory, which only CUDA has: set it and "
        "compile.enable to false"
    )


def _ring_attention(config: Config) -> str | None:
    parallelism = config.parallelism
    if parallelism.context_parallel_degree == 1 or parallelism.context_parallel_method != "ring":
        return None
    return 'parallelism.context_parallel_method: torch 2.13 has no ring attention on a CPU: use "gather"'


def _compiled_float8(config: Config) -> str | None:
    bf16 = config.training.mixed_precision_param == "bfloat16"
    if not config.compile.enable or config.float8.recipe_name is None or not bf16:
        return None
    return (
        "compile.enable: torch 2.13 cannot compile emulated float8 in bfloat16: set it to false, or "
        'training.mixed_precision_param to "float32"'
    )


def _cuda_graphs(config: Config) -> str | None:
    if not config.training.cuda_graphs:
        return None
    return "training.cuda_graphs: a CPU has no CUDA graphs: set it to false"


def _cuda_attention(config: Config) -> str | None:
    backend = config.training.attention_backend
    if backend not in ("cudnn", "efficient", "flex"):
        return None
    return f'training.attention_backend: "{backend}" is a CUDA kernel: use "default", "flash", "math" or "fastest"'


def _triton_optimizer(config: Config) -> str | None:
    if config.optimizer.implementation != "triton":
        return None
    return 'optimizer.implementation: "triton" compiles a kernel for the GPU: use "fused"'


CPU_RULES: tuple[CPURule, ...] = (
    CPURule("ring attention", "torch 2.13 has no ring attention on a CPU", _ring_attention),
    CPURule("async TP", "it needs symmetric memory, which only CUDA has", _async_tp),
    CPURule("float8 with torch.compile in bfloat16", "torch 2.13 cannot compile the emulation", _compiled_float8),
    CPURule("CUDA graphs", "a CPU has none", _cuda_graphs),
    CPURule("the attention kernels cudnn, efficient and flex", "they are CUDA kernels", _cuda_attention),
    CPURule('optimizer.implementation = "triton"', "Triton compiles for GPUs only", _triton_optimizer),
)
