"""torch.compile, block by block."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from titan_cpt.models.common.language_model import LanguageModel


def apply_compile(model: LanguageModel) -> None:
    """Compile each transformer block; all blocks share the generated code."""
    for layer, block in list(model.blocks.items()):
        model.blocks[layer] = cast(nn.Module, torch.compile(block))
