"""The optimizer of a run: AdamW, or one that also has Muon if any stage uses it."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from titan_cpt.config.schema import Config
from titan_cpt.distributed.device_mesh import Mesh
from titan_cpt.distributed.master_weights import ComputeCopy
from titan_cpt.models.common.language_model import LanguageModel
from titan_cpt.planning.plan import Plan
from titan_cpt.training.optimization.adamw import build_adamw
from titan_cpt.training.optimization.muon import Muon


def build_optimizer(
    config: Config,
    plan: Plan,
    mesh: Mesh,
    model: nn.Module,
    stages: Mapping[int, LanguageModel],
    compute_copy: ComputeCopy | None,
) -> AdamW:
    """The optimizer with the first stage's hyperparameters; collective. With Triton it writes the compute copy.

    Args:
        model: this rank's weights, already sharded.
        stages: this rank's pipeline stages, by number.
    """
    given = plan.stages[0].optimizer
    numbers = {"eps": given.eps, "weight_decay": given.weight_decay}
    everything = all(stage.partition is None for stage in plan.stages)  # otherwise moments might not fit
    if all(stage.optimizer.muon is None for stage in plan.stages):
        triton = config.optimizer.implementation == "triton"
        copies = _triton_copies(plan, stages, compute_copy) if triton and compute_copy is not None else None
        return build_adamw(
            model, lr=0.0, betas=given.betas, triton=triton, copies=copies, allocate=everything, **numbers
        )
    optimizer = Muon(model, lr=0.0, betas=given.betas, group=_holders_group(mesh), **numbers)
    optimizer.use(given.muon, allocate=everything)
    return optimizer


def _holders_group(mesh: Mesh) -> dist.ProcessGroup | None:
    """The process group of the ranks that hold shards of this rank's layers; collective."""
    if mesh.device_mesh is None:
        return None
    groups = [dist.new_group(ranks) for ranks in mesh.pipeline_peers]  # every rank takes part in creating all of them
    group: dist.ProcessGroup = groups[mesh.coordinates.pipeline]
    return group


def _triton_copies(plan: Plan, stages: Mapping[int, LanguageModel], compute_copy: ComputeCopy) -> dict[Tensor, Tensor]:
    """Master weight -> compute copy that the Triton kernel writes."""
    whole = stages[0]
    head = whole.embedding if plan.spec.tied else whole.head  # the loss computes its weight's gradient in float32
    assert head is not None, "a single process has the whole model"
    accumulates = any(
        plan.accumulation(stage, phase.first_step) > 1
        for stage in plan.stages
        for phase in stage.batch_sizes.within(stage.steps)
    )
    return compute_copy.leave_to_optimizer(accumulates=accumulates, float32=tuple(head.parameters()))
