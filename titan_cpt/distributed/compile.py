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
    """Compile each transformer block; all blocks share the generated code."""
    for layer, block in list(model.blocks.items()):
        model.blocks[layer] = cast(nn.Module, torch.compile(block))


def require_compiler(device: torch.device) -> None:
    """Check that torch.compile has its compiler: g++ or CXX for a CPU; Triton and a C compiler for CUDA.

    Raises:
        ConfigError: it is missing; torch would raise in the first step only.
    """
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "compile.enable: needs Triton, which comes with torch's CUDA builds: `pip install triton`, or unset it"
        )
    variable, names = ("CC", ("gcc", "clang", "cc")) if device.type == "cuda" else ("CXX", ("g++",))
    chosen = os.environ.get(variable)
    if not any(map(shutil.which, (chosen,) if chosen else names)):
        what = f"{variable}={chosen}, which does not exist" if chosen else f"none of {', '.join(names)} is installed"
        raise ConfigError(
            f"compile.enable: torch.compile needs a compiler, and {what}: install one (apt install g++, module load "
            f"gcc, conda install gxx), name one in {variable}, or remove the key"
        )
