"""torch.compile, block by block."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import cast

import torch
from torch import nn

from titan_cpt.errors import ConfigError
from titan_cpt.models.common.language_model import LanguageModel


def apply_compile(model: LanguageModel) -> None:
    """Compile each transformer block separately, in place; all blocks share the generated code."""
    for layer, block in list(model.blocks.items()):
        model.blocks[layer] = cast(nn.Module, torch.compile(block))


def require_compiler(device: torch.device) -> None:
    """Check that torch.compile finds its compilers: g++ or $CXX for a CPU; Triton, and a C compiler or $CC, for CUDA.

    Raises:
        ConfigError: one is missing. Without this check torch would raise an error in the first training step.
    """
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "compile.enable: needs Triton, which comes with torch's CUDA builds: `pip install triton`, or remove "
            "the key"
        )
    variable = "CC" if device.type == "cuda" else "CXX"
    defaults = ("gcc", "clang", "cc") if device.type == "cuda" else ("g++",)
    configured = os.environ.get(variable)
    if not any(map(shutil.which, (configured,) if configured else defaults)):
        problem = f"{variable}={configured} does not exist"
        if not configured:
            problem = f"none of {', '.join(defaults)} is installed"
        raise ConfigError(
            f"compile.enable: torch.compile needs a compiler, but {problem}: install one (apt install g++, module load "
            f"gcc, conda install gxx), set {variable} to one, or remove the key"
        )
