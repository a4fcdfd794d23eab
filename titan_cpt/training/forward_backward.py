"""Forward and backward of one micro-batch, with and without pipeline parallelism, and the loss for validation.

Both runners have `backward`, for training, and `per_sequence_loss`, for validation. B sequences, L positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class
from torch.distributed.tensor.parallel import loss_parallel

from titan_cpt.distributed.context_parallel import local_positions
from titan_cpt.distributed.device_mesh import Mesh
from titan_cpt.distributed.master_weights import ComputeCopy
from titan_cpt.distributed.options import ParallelOptions
from titan_cpt.models.common.language_model import LanguageModel
from titan_cpt.training.loss import fused_linear_cross_entropy, summed_cross_entropy


class SingleStageRunner:
    """Runs a model all of whose layers are on this rank (no pipeline parallelism).

    Args:
        model: the module that computes.
        copy: updates the weights of `model` from float32 master weights, where `model` is a compute copy.
    """

    def __init__(
        self, model: nn.Module, mesh: Mesh, copy: ComputeCopy | None = None, *, compiled: bool = False
    ) -> None:
        self.model, self.mesh, self.copy, self.compiled = model, mesh, copy, compiled

    def backward(self, inputs_BL: Tensor, targets_BL: Tensor, step_tokens: int) -> Tensor:
        """Accumulate this micro-batch's gradients; returns this rank's share of the global batch's mean loss.

        Args:
            inputs_BL: token ids, int64.
            targets_BL: the next token's id at every position, int64.
            step_tokens: target tokens of the global batch, by which the summed loss is divided.
        """
        inputs_BL, targets_BL = own_inputs(inputs_BL, self.mesh), own_part(targets_BL, self.mesh)
        if self.copy is not None:
            self.copy.refresh()
            self.copy.take_gradients()
        with sharded_loss(self.mesh):
            if self.mesh.parallel_dims.tp > 1:  # the head's rows are split over ranks
                part = summed_cross_entropy(unpadded(self.model(inputs_BL), targets_BL), targets_BL) / step_tokens
            else:
                loss = partial(
                    fused_linear_cross_entropy, targets_BL=targets_BL, scale=1 / step_tokens, compiled=self.compiled
                )
                part = self.model(inputs_BL, loss)
            part.backward()  # type: ignore[no-untyped-call]
        if self.copy is not None:
            self.copy.give_gradients()
        return part.detach()

    @torch.no_grad()
    def per_sequence_loss(self, inputs_BL: Tensor, targets_BL: Tensor) -> Tensor:
        """The summed loss of every sequence in nats, [B], equal on all ranks that share the batch; collective."""
        inputs_BL, targets_BL = own_inputs(inputs_BL, self.mesh), own_part(targets_BL, self.mesh)
        if self.copy is not None:
            self.copy.refresh()
        with sharded_loss(self.mesh):
            nats_B = losses_by_sequence(self.model(inputs_BL), targets_BL)
        if self.mesh.context is not None:
            dist.all_reduce(nats_B, group=self.mesh.context)
        return nats_B


class PipelineRunner:
    """Runs a model whose layers are split over pipeline-parallel ranks, by a schedule of torch.distributed.pipelining.

    Args:
        stages: this rank's pipeline stages, by number, parallelized over the other dimensions already.
        width: D.
    """

    def __init__(self, stages: dict[int, nn.Module], mesh: Mesh, precision: torch.dtype, *, width: int) -> None:
        assert mesh.pipeline is not None, "a pipeline needs several ranks"
        self.stages, self.mesh, self.precision, self.width = stages, mesh, precision, width
        self.group, self._step_tokens = mesh.pipeline, 1
        layout = mesh.parallel_dims
        self.owners = {
            stage: dist.get_global_rank(self.group, rank)
            for rank in range(layout.pp)
            for stage in layout.stages_of(rank)
        }
        parts = [
            PipelineStage(module, number, layout.pipeline_stages, mesh.process.device, group=self.group)
            for number, module in stages.items()
        ]
        schedule = get_schedule_class(layout.schedule)
        self._schedule = schedule(
            parts[0] if issubclass(schedule, PipelineScheduleSingle) else parts,
            n_microbatches=layout.microbatches,
            loss_fn=self._loss,
            scale_grads=False,  # the loss is divided by the global batch's tokens already
        )

    @property
    def last(self) -> nn.Module | None:
        """The pipeline stage that computes the logits, on its rank; None on the others."""
        return self.stages.get(self.mesh.parallel_dims.pipeline_stages - 1)

    def backward(self, inputs_BL: Tensor, targets_BL: Tensor, step_tokens: int) -> Tensor:
        """Like `SingleStageRunner.backward`, for batches of one size; 0 on ranks without the last pipeline stage."""
        self._step_tokens = step_tokens
        inputs = (own_inputs(inputs_BL, self.mesh),) if 0 in self.stages else ()
        target = own_part(targets_BL, self.mesh) if self.last is not None else None
        losses: list[Tensor] | None = [] if self.last is not None else None
        with sharded_loss(self.mesh):
            self._schedule.step(*inputs, target=target, losses=losses, return_outputs=False)
        return torch.stack(losses).detach().sum() if losses else torch.zeros((), device=self.mesh.process.device)

    @torch.no_grad()
    def per_sequence_loss(self, inputs_BL: Tensor, targets_BL: Tensor) -> Tensor:
        """Like `SingleStageRunner.per_sequence_loss`; pipeline stages run one after another, without overlap.

        `schedule.eval` fails for the V schedules (torch 2.13), and makes the next step infer all shapes again.
        """
        pieces = max(1, min(self.mesh.parallel_dims.microbatches, len(inputs_BL)))
        nats = []
        for inputs, targets in zip(inputs_BL.chunk(pieces), targets_BL.chunk(pieces), strict=True):
            logits = self._forward(own_inputs(inputs, self.mesh))
            nats.append(torch.zeros(len(inputs), device=inputs.device))
            if logits is not None:
                with sharded_loss(self.mesh):
                    nats[-1] = losses_by_sequence(logits, own_part(targets, self.mesh))
        nats_B = torch.cat(nats)
        for group in (self.group, self.mesh.context):
            if group is not None:
                dist.all_reduce(nats_B, group=group)
        return nats_B

    def _forward(self, tokens_BL: Tensor) -> Tensor | None:
        """The logits, on the rank with the last pipeline stage; None on the others."""
        me = self.mesh.process.rank
        length = tokens_BL.shape[1] // self.mesh.parallel_dims.tp  # activations between stages are sequence-parallel
        x: Tensor | None = None
        for number, module in self.stages.items():
            before, after = self.owners.get(number - 1), self.owners.get(number + 1)
            if before is None:
                x = tokens_BL
            elif before != me:
                x = torch.empty(len(tokens_BL), length, self.width, dtype=self.precision, device=tokens_BL.device)
                dist.recv(x, src=before, group=self.group)
            x = module(x)
            if after not in (None, me):
                dist.send(x.contiguous(), dst=after, group=self.group)
        return x if self.last is not None else None

    def _loss(self, logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
        return summed_cross_entropy(unpadded(logits_BLV, targets_BL), targets_BL) / self._step_tokens


ModelRunner = SingleStageRunner | PipelineRunner


def make_runner(
    stages: Mapping[int, LanguageModel], compute_copy: ComputeCopy | None, mesh: Mesh, options: ParallelOptions
) -> ModelRunner:
    """The runner of this rank's pipeline stages; see `build_parallel_model` for stages and compute_copy."""
    if mesh.parallel_dims.pp > 1:
        width = next(iter(stages.values())).spec.width
        return PipelineRunner(dict(stages), mesh, options.precision, width=width)
    return SingleStageRunner(stages[0], mesh, compute_copy, compiled=options.compiled)


def own_part(tokens_BL: Tensor, mesh: Mesh) -> Tensor:
    """This rank's positions of a batch, on its device: all of them without context parallelism."""
    tokens_BL = tokens_BL.to(mesh.process.device, non_blocking=True)
    if mesh.parallel_dims.cp == 1:
        return tokens_BL
    positions = local_positions(tokens_BL.shape[1], mesh.coordinates.context, mesh.parallel_dims.cp)
    return tokens_BL[:, positions.to(tokens_BL.device)]


def own_inputs(tokens_BL: Tensor, mesh: Mesh) -> Tensor:
    """`own_part`, padded at the end to a number of positions that sequence parallelism can split equally.

    Causal attention never attends to the padding, and `unpadded` removes it from the logits: no value changes.
    """
    tokens_BL = own_part(tokens_BL, mesh)
    return F.pad(tokens_BL, (0, -tokens_BL.shape[1] % mesh.parallel_dims.tp))


def unpadded(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """The logits of the positions that have a target."""
    return logits_BLV if logits_BLV.shape[1] == targets_BL.shape[1] else logits_BLV[:, : targets_BL.shape[1]]


def sharded_loss(mesh: Mesh) -> AbstractContextManager[object]:
    """Context in which torch computes the cross-entropy of logits that are sharded over the vocabulary."""
    return loss_parallel() if mesh.parallel_dims.tp > 1 and mesh.parallel_dims.loss_parallel else nullcontext()


def losses_by_sequence(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """The summed loss of every sequence in nats, [B]."""
    logits_BLV, sequences = unpadded(logits_BLV, targets_BL), range(len(targets_BL))
    return torch.stack([summed_cross_entropy(logits_BLV[b : b + 1], targets_BL[b : b + 1]) for b in sequences])
