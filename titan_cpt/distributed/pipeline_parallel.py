"""From a shape to the parts of the model that a rank holds, laid over the ranks, and the engine that runs them."""

from __future__ import annotations

import torch
from torch import nn

from titan_cpt.distributed.device_mesh import Mesh
from titan_cpt.distributed.float8 import require_float8
from titan_cpt.distributed.master_weights import ComputeCopy
from titan_cpt.distributed.parallelize import ParallelOptions, parallelize
from titan_cpt.models import build
from titan_cpt.models.build import LanguageModel
from titan_cpt.models.spec import ModelSpec
from titan_cpt.training.forward_backward import ModelRunner, PipelineRunner, SingleStageRunner


def build_model(shape: ModelSpec, mesh: Mesh, parallel_options: ParallelOptions) -> tuple[LanguageModel, ModelRunner]:
    """This rank's model, its weights not set yet, and what runs it.

    The model holds every stage of this rank under the names of the whole model, so that initial weights, optimizer and
    checkpoints need not know of a pipeline. Its weights are float32; a single process in reduced precision runs a
    working copy of it.
    """
    if parallel_options.float8 is not None:
        require_float8(mesh.ranks.device)
    stages = {number: cut(shape, mesh, number) for number in mesh.layout.stages_of(mesh.place.pipeline)}
    for stage in stages.values():
        parallelize(stage, mesh, parallel_options)
        stage.to_empty(device="cpu" if parallel_options.offloaded else mesh.ranks.device)
    if mesh.dims is None and parallel_options.precision != torch.float32:
        trained, working = cut(shape, mesh, 0), stages[0].to(parallel_options.precision)
        trained.to_empty(device=mesh.ranks.device)
        copy = ComputeCopy(trained, working)
        return trained, SingleStageRunner(working, mesh, copy, compiled=parallel_options.compiled)
    if mesh.layout.pp == 1:
        return stages[0], SingleStageRunner(stages[0], mesh, compiled=parallel_options.compiled)
    engine = PipelineRunner({**stages}, mesh, parallel_options.precision, width=shape.width)
    return merged(list(stages.values())), engine


def cut(shape: ModelSpec, mesh: Mesh, stage: int) -> LanguageModel:
    """One stage of the model on the meta device: the embedding is in the first, norm and head in the last."""
    with torch.device("meta"):
        model = build.build_model(shape)
    kept = {str(layer) for layer in mesh.layout.layers_of(stage, shape.layers)}
    for layer in list(model.blocks):
        if layer not in kept:
            del model.blocks[layer]
    if stage > 0:
        model.embedding = None
    if stage < mesh.layout.stages - 1:
        model.final_norm = model.head = None
    return model


def merged(stages: list[LanguageModel]) -> LanguageModel:
    """One model that shares all modules of several stages; it is never run, only initialised, counted and saved."""
    if len(stages) == 1:
        return stages[0]
    with torch.device("meta"):
        model = build.build_model(stages[0].shape)
    model.blocks = nn.ModuleDict({layer: block for stage in stages for layer, block in stage.blocks.items()})
    model.embedding = next((stage.embedding for stage in stages if stage.embedding is not None), None)
    model.final_norm = next((stage.final_norm for stage in stages if stage.final_norm is not None), None)
    model.head = next((stage.head for stage in stages if stage.head is not None), None)
    return model
