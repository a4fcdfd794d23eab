"""Pipeline parallelism: split a model into pipeline stages of consecutive layers. A rank may hold several of them."""

from __future__ import annotations

import torch
from torch import nn

from titan_cpt.distributed.device_mesh import Mesh
from titan_cpt.models.build import build_model
from titan_cpt.models.common.language_model import LanguageModel
from titan_cpt.models.spec import ModelSpec


def build_pipeline_stage(spec: ModelSpec, mesh: Mesh, stage: int) -> LanguageModel:
    """Build one pipeline stage on the meta device. The first has the embedding, the last final norm and head."""
    with torch.device("meta"):
        model = build_model(spec)
    own = {str(layer) for layer in mesh.parallel_dims.layers_of(stage, spec.layers)}
    for layer in list(model.blocks):
        if layer not in own:
            del model.blocks[layer]
    if stage > 0:
        model.embedding = None
    if stage < mesh.parallel_dims.pipeline_stages - 1:
        model.final_norm = model.head = None
    return model


def merge_pipeline_stages(stages: list[LanguageModel]) -> LanguageModel:
    """One model that shares the modules of this rank's pipeline stages, for initialization, optimizer and checkpoints.

    Do not call its `forward`: layers between its stages may be on other ranks.
    """
    if len(stages) == 1:
        return stages[0]
    with torch.device("meta"):
        model = build_model(stages[0].spec)
    model.blocks = nn.ModuleDict({layer: block for stage in stages for layer, block in stage.blocks.items()})
    model.embedding = next((stage.embedding for stage in stages if stage.embedding is not None), None)
    model.final_norm = next((stage.final_norm for stage in stages if stage.final_norm is not None), None)
    model.head = next((stage.head for stage in stages if stage.head is not None), None)
    return model
