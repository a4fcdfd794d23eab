"""Build this rank's parallelized model from a spec."""

from __future__ import annotations

import torch

from titan_cpt.distributed.device_mesh import Mesh
from titan_cpt.distributed.float8 import require_float8
from titan_cpt.distributed.master_weights import ComputeCopy
from titan_cpt.distributed.options import ParallelOptions
from titan_cpt.distributed.parallelize import parallelize
from titan_cpt.distributed.pipeline_parallel import build_pipeline_stage, merge_pipeline_stages
from titan_cpt.models.common.language_model import LanguageModel
from titan_cpt.models.spec import ModelSpec


def build_parallel_model(
    spec: ModelSpec, mesh: Mesh, options: ParallelOptions
) -> tuple[LanguageModel, dict[int, LanguageModel], ComputeCopy | None]:
    """Build, parallelize and materialize the pipeline stages of this rank, with uninitialized weights.

    Returns:
        model: the float32 weights to initialize, train and save. It holds all pipeline stages of this rank under the
            parameter names of the whole model, so that optimizer and checkpoints do not depend on the pipeline degree.
        stages: pipeline stage index -> the module to run; only stage 0 without pipeline parallelism.
        compute_copy: in a single process with mixed precision, where stage 0 is a separate bf16 module: updates it from
            `model`. Otherwise None.

    Raises:
        ConfigError: float8 is requested, and this machine does not support it (see `require_float8`).
    """
    if options.float8 is not None:
        require_float8(mesh.process.device)
    stages = {
        number: build_pipeline_stage(spec, mesh, number)
        for number in mesh.parallel_dims.stages_of(mesh.coordinates.pipeline)
    }
    for stage in stages.values():
        parallelize(stage, mesh, options)
        stage.to_empty(device="cpu" if options.offloaded else mesh.process.device)
    if mesh.device_mesh is not None or options.precision == torch.float32:
        return merge_pipeline_stages(list(stages.values())), stages, None
    model = build_pipeline_stage(spec, mesh, 0)
    model.to_empty(device=mesh.process.device)
    return model, stages, ComputeCopy(model, stages[0].to(options.precision))
