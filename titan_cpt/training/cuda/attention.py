"""The kernels of a run's attention, across documents and inside them, on a GPU or a CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from titan_cpt.config.schema import Config
from titan_cpt.distributed.attention_backend import choose_attention_backend, set_attention_backend
from titan_cpt.distributed.attention_timing import AttentionChoice, AttentionShape
from titan_cpt.distributed.device_mesh import Mesh
from titan_cpt.distributed.document_backend import Circumstances, choose_document_backend, set_document_backend
from titan_cpt.models.common.language_model import LanguageModel
from titan_cpt.planning.plan import Plan, StagePlan


@dataclass(frozen=True)
class AttentionKernels:
    """The kernels that a run uses.

    Attributes:
        chosen: of attention_backend and document_attention_backend, those that torch does not choose, for the log.
        measured: the same under "fastest_attention" and "fastest_document_attention" if they were chosen by measuring,
            for the checkpoints; and the former by sequence length.
        notes: for the user.
        by_stage: of attention across documents in each stage; empty if torch chooses.
    """

    chosen: Mapping[str, str]
    measured: Mapping[str, Any]
    notes: tuple[str, ...]
    by_stage: Mapping[str, str]

    def use(self, stage: str, models: Sequence[LanguageModel]) -> None:
        """Compute the attention of these models as the stage does."""
        if self.by_stage:
            set_attention_backend(models, self.by_stage[stage])


def choose_attention(
    config: Config,
    plan: Plan,
    models: Sequence[LanguageModel],
    mesh: Mesh,
    manifest: Mapping[str, Any],
    *,
    group: dist.ProcessGroup | None,
) -> AttentionKernels:
    """Set the kernels of the models' attention; collective.

    Args:
        manifest: of the checkpoint that the run resumes from, which records what an earlier session measured.
        group: a gloo group of all ranks.

    Raises:
        ConfigError: this device cannot use the requested kernel.
    """
    requested = config.training.attention_backend
    masked = [stage for stage in plan.stages if stage.document_mask]
    validates_masked = config.training.document_mask
    across = [stage for stage in plan.stages if not stage.document_mask] or list(plan.stages) * (not validates_masked)
    choices: dict[str, AttentionChoice | None] = {}
    by_length: dict[int, AttentionChoice] = {}
    if across and requested not in ("default", "flex"):
        lengths = sorted({stage.seq_len for stage in across}, reverse=True)
        for length in lengths if requested == "fastest" else lengths[:1]:
            shape = _shape(config, plan, [stage for stage in across if stage.seq_len == length])
            recorded = manifest.get("fastest_attention_by_length", {}).get(str(length))
            if "fastest_attention_by_length" not in manifest:  # by an older version
                recorded = manifest.get("fastest_attention")
            by_length[length] = choose_attention_backend(
                requested, recorded, models[0], shape, mesh.process, group=group
            )
        choices["attention"] = longest = by_length[lengths[0]]
        set_attention_backend(models, longest.backend)
    if masked or validates_masked:
        shape, recorded = _shape(config, plan, masked or plan.stages), manifest.get("fastest_document_attention")
        circumstances = _circumstances(config, plan)
        choices["document_attention"] = inside = choose_document_backend(
            requested, recorded, models[0], shape, mesh.process, circumstances, group=group
        )
        if inside is not None:
            set_document_backend(models, inside.backend)
    return _kernels(plan, requested, {name: choice for name, choice in choices.items() if choice}, by_length)


def _kernels(
    plan: Plan, requested: str, found: Mapping[str, AttentionChoice], by_length: Mapping[int, AttentionChoice]
) -> AttentionKernels:
    measured: dict[str, Any] = {f"fastest_{name}": choice.backend for name, choice in found.items()}
    measured["fastest_attention_by_length"] = {str(length): choice.backend for length, choice in by_length.items()}
    longest = found.get("attention")
    by_stage = {stage.name: by_length.get(stage.seq_len, longest) for stage in plan.stages}
    further = [choice for choice in by_length.values() if choice is not longest]
    return AttentionKernels(
        {f"{name}_backend": choice.backend for name, choice in found.items()},
        measured if requested == "fastest" else {},
        tuple(choice.note for choice in [*found.values(), *further] if choice.note),
        {name: choice.backend for name, choice in by_stage.items() if choice is not None},
    )


def _shape(config: Config, plan: Plan, stages: Sequence[StagePlan]) -> AttentionShape:
    """The largest attention of one rank in these stages."""
    dims, spec = plan.parallel_dims, plan.spec
    largest = max(stages, key=lambda stage: stage.seq_len)
    microbatch = config.parallelism.pipeline_parallel_microbatch_size if dims.pp > 1 else largest.local_batch_size
    return AttentionShape(
        sequences=microbatch,
        positions=largest.seq_len,
        heads=spec.heads // dims.tp,
        key_value_heads=spec.key_value_heads // dims.tp,
        head_width=spec.attention_width // spec.heads,
        dtype=getattr(torch, config.training.mixed_precision_param),
    )


def _circumstances(config: Config, plan: Plan) -> Circumstances:
    checkpointing = config.activation_checkpoint
    return Circumstances(
        cuda_graphs=config.training.cuda_graphs,
        context_parallel=plan.parallel_dims.cp > 1,
        selective_uncompiled=checkpointing.mode == "selective"
        and checkpointing.selective_ac_option == "op"
        and not config.compile.enable,
    )
