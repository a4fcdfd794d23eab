"""torch.compile, block by block or for the whole model without its head."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import cast

import torch
from torch import nn

from titan_cpt.distributed.options import ParallelOptions
from titan_cpt.errors import ConfigError
from titan_cpt.models.common.language_model import LanguageModel


def apply_compile(model: LanguageModel, options: ParallelOptions) -> None:
    """Compile a model in place, with torch.compile's mode `options.compile_mode`.

    Every shape is compiled by itself. By default torch compiles the second shape that it meets for variable sizes, so a
    stage's kernels, and the last bits of its losses, would depend on what the process had run before: a resumed run
    would differ from an unbroken one.

    - scope "block" compiles each transformer block separately; all blocks share the generated code.
    - scope "model" compiles `model.trunk` as one graph, so that operations are fused across the borders of blocks. The
      head stays outside: the fused linear cross-entropy computes its own gradients. In a single process only.
    """
    # Beyond its limit torch would run a block without compiling it, and say so in one line of a log.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, options.compiled_versions)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 2 * options.compiled_versions)
    if options.compile_scope == "model":
        model.trunk = torch.compile(model.trunk, mode=options.compile_mode, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
        return
    for layer, block in list(model.blocks.items()):
        model.blocks[layer] = cast(nn.Module, torch.compile(block, mode=options.compile_mode, dynamic=False))


def require_triton(setting: str) -> None:
    """Check that Triton is installed.

    Raises:
        ConfigError: it is not; the message begins with `setting`.
    """
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            f"{setting}: needs Triton, which comes with torch's CUDA builds: `pip install triton`, or remove the key"
        )


def require_compiler(device: torch.device, setting: str = "compile.enable") -> None:
    """Check that a setting finds its compilers: g++ or $CXX for a CPU; Triton, and a C compiler or $CC, for CUDA.

    Raises:
        ConfigError: one is missing; the message begins with `setting`. Without this check torch or Triton would raise
            an error in the first training step.
    """
    if device.type == "cuda":
        require_triton(setting)
    variable = "CC" if device.type == "cuda" else "CXX"
    defaults = ("gcc", "clang") if device.type == "cuda" else ("g++",)
    configured = os.environ.get(variable)
    if not any(map(shutil.which, (configured,) if configured else defaults)):
        problem = f"{variable}={configured} does not exist"
        if not configured:
            problem = f"none of {', '.join(defaults)} is installed"
        raise ConfigError(
            f"{setting}: {'Triton' if device.type == 'cuda' else 'torch.compile'} needs a compiler, but {problem}: "
            f"install one (apt install g++, module load gcc, conda install gxx), set {variable} to one, or remove the "
            "key"
        )
