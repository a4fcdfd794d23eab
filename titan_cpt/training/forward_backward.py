"""One optimizer step, from forward and backward of its micro-batches to the update; and the loss for validation.

`EagerStep` makes a step of a runner and the optimizer. Both runners, with and without pipeline parallelism, have
`backward`, for training, and `per_sequence_loss`, for validation.

Shape letters: B sequences, L positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.optim import AdamW

from titan_cpt.data.batch import Batch
from titan_cpt.distributed.context_parallel import local_positions
from titan_cpt.distributed.device_mesh import Mesh
from titan_cpt.distributed.float8 import refresh_scales
from titan_cpt.distributed.master_weights import ComputeCopy
from titan_cpt.distributed.options import ParallelOptions
from titan_cpt.models.common.language_model import LanguageModel
from titan_cpt.training.loss import SourceSums, fused_linear_cross_entropy, summed_cross_entropy
from titan_cpt.training.optimization.trained_weights import TrainedWeights
from titan_cpt.training.optimization.update import UpdateGuard, clip_grad_norm


class SingleStageRunner:
    """Runs a model without pipeline parallelism: all of its layers are on this rank.

    Args:
        model: the module for forward and backward.
        copy: if `model` is a compute copy, updates it from the float32 master weights before each pass.
        compiled: also compile the softmax of the loss.
    """

    def __init__(
        self, model: nn.Module, mesh: Mesh, copy: ComputeCopy | None = None, *, compiled: bool = False
    ) -> None:
        self.model = model
        self.mesh = mesh
        self.copy = copy
        self.compiled = compiled

    @property
    def models(self) -> list[LanguageModel]:
        """The modules whose forward and backward pass run."""
        return [cast(LanguageModel, self.model)]

    def backward(self, batch: Batch, step_tokens: int, sums_S2: Tensor | None = None) -> Tensor:
        """Accumulate this micro-batch's gradients; returns its share of the global batch's mean loss, nats per token.

        Args:
            step_tokens: target tokens of the global batch, by which the summed loss is divided.
            sums_S2: adds to these sums of every source, see `SourceSums`; needs the batch's sources.
        """
        inputs_BL = local_inputs(batch.inputs_BL, self.mesh)
        targets_BL = local_tokens(batch.targets_BL, self.mesh)
        if self.copy is not None:
            self.copy.refresh()
        documents = local_documents(batch, self.mesh)
        by_source = source_sums(batch.sources_B, sums_S2)
        with sharded_loss(self.mesh):
            if self.mesh.parallel_dims.tp > 1:  # tensor parallelism splits the head's rows over ranks
                logits_BLV = unpadded(self.model(inputs_BL, **documents), targets_BL)
                loss = summed_cross_entropy(logits_BLV, targets_BL, by_source=by_source) / step_tokens
            else:
                head_and_loss = partial(
                    fused_linear_cross_entropy,
                    targets_BL=targets_BL,
                    scale=1 / step_tokens,
                    compiled=self.compiled,
                    by_source=by_source,
                )
                loss = self.model(inputs_BL, head_and_loss, **documents)
            if self.copy is not None:
                self.copy.take_gradients()
            loss.backward()  # type: ignore[no-untyped-call]
        if self.copy is not None:
            self.copy.give_gradients()
        return loss.detach()

    @torch.no_grad()
    def per_sequence_loss(self, batch: Batch) -> Tensor:
        """The summed loss of every sequence in nats, [B], equal on all ranks that share the batch; collective."""
        inputs_BL = local_inputs(batch.inputs_BL, self.mesh)
        targets_BL = local_tokens(batch.targets_BL, self.mesh)
        if self.copy is not None:
            self.copy.refresh()
        with sharded_loss(self.mesh):
            nats_B = losses_by_sequence(self.model(inputs_BL, **local_documents(batch, self.mesh)), targets_BL)
        if self.mesh.context is not None:
            dist.all_reduce(nats_B, group=self.mesh.context)
        return nats_B

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """The logits of every position, [B, L, V], on every rank; collective. Not for context parallelism."""
        if self.copy is not None:
            self.copy.refresh()
        inputs_BL = local_inputs(batch.inputs_BL, self.mesh)
        logits_BLV: Tensor = self.model(inputs_BL, **local_documents(batch, self.mesh))
        return unpadded(logits_BLV.full_tensor() if isinstance(logits_BLV, DTensor) else logits_BLV, batch.inputs_BL)


class PipelineRunner:
    """Runs a model whose layers are split over pipeline-parallel ranks, by a schedule of torch.distributed.pipelining.

    Args:
        stages: this rank's pipeline stages by number, already parallelized over the other dimensions.
        precision: dtype of the activations that ranks send to each other.
        width: D, the width of these activations.
    """

    def __init__(self, stages: dict[int, nn.Module], mesh: Mesh, precision: torch.dtype, *, width: int) -> None:
        assert mesh.pipeline is not None, "a pipeline needs several ranks"
        self.stages = stages
        self.mesh = mesh
        self.precision = precision
        self.width = width
        self.group = mesh.pipeline
        self._step_tokens = 1
        self._sums_S2: Tensor | None = None
        self._has_sources = False
        self._first_S2: Tensor | None = None
        self._loss_calls = 0
        dims = mesh.parallel_dims
        self.owners = {
            stage: dist.get_global_rank(self.group, rank) for rank in range(dims.pp) for stage in dims.stages_of(rank)
        }
        self._schedule: Any = None
        self._shape: torch.Size | None = None
        if 0 in stages:
            stages[0].register_forward_hook(_with_gradient)

    @property
    def models(self) -> list[LanguageModel]:
        """The modules whose forward and backward pass run."""
        return [cast(LanguageModel, stage) for stage in self.stages.values()]

    @property
    def last(self) -> nn.Module | None:
        """The last pipeline stage, which computes the logits, if it is on this rank; else None."""
        return self.stages.get(self.mesh.parallel_dims.pipeline_stages - 1)

    def backward(self, batch: Batch, step_tokens: int, sums_S2: Tensor | None = None) -> Tensor:
        """As `SingleStageRunner.backward`; 0 on ranks without the last pipeline stage."""
        self._step_tokens, self._sums_S2, self._has_sources = step_tokens, sums_S2, batch.sources_B is not None
        self._first_S2, self._loss_calls = None, 0
        if batch.inputs_BL.shape != self._shape:  # on every rank at the same step, where a stage has other batches
            self._first_S2 = None if sums_S2 is None else torch.zeros_like(sums_S2)
            self._schedule, self._shape = self._schedule_of(len(batch.inputs_BL)), batch.inputs_BL.shape
        inputs = (local_inputs(batch.inputs_BL, self.mesh),) if 0 in self.stages else ()
        target = None
        if self.last is not None:
            target = local_tokens(batch.targets_BL, self.mesh)
            if batch.sources_B is not None:  # a last column: the schedule splits it into micro-batches as well
                target = torch.cat([target, batch.sources_B.to(target.device)[:, None]], dim=1)
        losses: list[Tensor] | None = [] if self.last is not None else None
        documents = local_documents(batch, self.mesh)  # every pipeline stage needs them; split into micro-batches
        with sharded_loss(self.mesh):
            self._schedule.step(*inputs, target=target, losses=losses, return_outputs=False, **documents)
        if sums_S2 is not None and self._first_S2 is not None and losses and self._loss_calls == len(losses):
            sums_S2 += self._first_S2  # the first call was a micro-batch, see `_loss`
        return torch.stack(losses).detach().sum() if losses else torch.zeros((), device=self.mesh.process.device)

    @torch.no_grad()
    def per_sequence_loss(self, batch: Batch) -> Tensor:
        """As `SingleStageRunner.per_sequence_loss`; the pipeline stages run one after another, without overlap.

        torch's `schedule.eval` is not used: in 2.13 it fails for V schedules and makes the next step infer all shapes.
        """
        microbatches = max(1, min(self.mesh.parallel_dims.microbatches, len(batch.inputs_BL)))
        nats = []
        for part in batch.chunk(microbatches):
            logits = self._forward(local_inputs(part.inputs_BL, self.mesh), local_documents(part, self.mesh))
            nats.append(torch.zeros(len(part.inputs_BL), device=self.mesh.process.device))
            if logits is not None:
                with sharded_loss(self.mesh):
                    nats[-1] = losses_by_sequence(logits, local_tokens(part.targets_BL, self.mesh))
        nats_B = torch.cat(nats)
        for group in (self.group, self.mesh.context):
            if group is not None:
                dist.all_reduce(nats_B, group=group)
        return nats_B

    def _schedule_of(self, sequences: int) -> Any:
        """A schedule for local batches of this number of sequences; its first step fixes the shapes of all."""
        dims = self.mesh.parallel_dims
        pipeline_stages = [
            PipelineStage(module, number, dims.pipeline_stages, self.mesh.process.device, group=self.group)
            for number, module in self.stages.items()
        ]
        schedule = get_schedule_class(dims.schedule)
        return schedule(
            pipeline_stages[0] if issubclass(schedule, PipelineScheduleSingle) else pipeline_stages,
            n_microbatches=sequences // dims.microbatch_size,
            loss_fn=self._loss,
            scale_grads=False,  # `_loss` divides by the global batch's tokens
        )

    def _forward(self, tokens_BL: Tensor, documents: dict[str, Any]) -> Tensor | None:
        """The logits, on the rank with the last pipeline stage; None on the others."""
        rank = self.mesh.process.rank
        length = tokens_BL.shape[1] // self.mesh.parallel_dims.tp  # activations between stages are sequence-parallel
        x: Tensor | None = None
        for number, module in self.stages.items():
            previous_rank = self.owners.get(number - 1)
            next_rank = self.owners.get(number + 1)
            if previous_rank is None:
                x = tokens_BL
            elif previous_rank != rank:
                x = torch.empty(len(tokens_BL), length, self.width, dtype=self.precision, device=tokens_BL.device)
                dist.recv(x, src=previous_rank, group=self.group)
            x = module(x, **documents)
            if next_rank not in (None, rank):
                dist.send(x.contiguous(), dst=next_rank, group=self.group)
        return x if self.last is not None else None

    def _loss(self, logits_BLV: Tensor, target: Tensor) -> Tensor:
        """A micro-batch's loss. To infer shapes a new schedule of torch 2.13 calls it once more, before the others.

        That call must not count in the sums of sources: the first call of a schedule has sums of its own.
        """
        self._loss_calls += 1
        by_source = None
        if self._has_sources:
            target, sources_B = target[:, :-1], target[:, -1]
            first = self._loss_calls == 1 and self._first_S2 is not None
            by_source = source_sums(sources_B, self._first_S2 if first else self._sums_S2)
        logits_BLV = unpadded(logits_BLV, target)
        return summed_cross_entropy(logits_BLV, target, by_source=by_source) / self._step_tokens


def _with_gradient(_stage: nn.Module, _inputs: object, x_BLD: Tensor) -> Tensor:
    """Let the later pipeline stages send a gradient to the first one, even if it is frozen and drops the gradient.

    Without that, schedules that split the backward pass (ZBVZeroBubble, InterleavedZeroBubble, DualPipeV) silently
    leave out the gradients of the next stage's weights, as that stage's input has no gradient (torch 2.13 and 2.14).
    """
    return x_BLD.requires_grad_() if torch.is_grad_enabled() and not x_BLD.requires_grad else x_BLD


ModelRunner = SingleStageRunner | PipelineRunner


def make_runner(
    stages: Mapping[int, LanguageModel], compute_copy: ComputeCopy | None, mesh: Mesh, options: ParallelOptions
) -> ModelRunner:
    """The runner of this rank's pipeline stages; see `build_parallel_model` for stages and compute_copy."""
    if mesh.parallel_dims.pp > 1:
        width = next(iter(stages.values())).spec.width
        return PipelineRunner(dict(stages), mesh, options.precision, width=width)
    return SingleStageRunner(stages[0], mesh, compute_copy, compiled=options.compiled)


@dataclass(frozen=True)
class StepResult:
    """Loss, gradient norm and health of one step, as tensors on the device.

    Attributes:
        loss: mean over the global batch in nats per token, 0-dimensional.
        grad_norm: L2 norm before clipping, 0-dimensional.
        health: result of `UpdateGuard.observe`, [2]; None for a skipped batch.
        sums_S2: this rank's share of the sums of every source, see `SourceSums`; None for a skipped batch.
    """

    loss: Tensor
    grad_norm: Tensor
    health: Tensor | None
    sums_S2: Tensor | None = None


class EagerStep:
    """Launches every operation of a step from Python. `CapturedStep` captures the same methods in CUDA graphs.

    Args:
        model: this rank's float32 weights.
        runner: forward and backward of a micro-batch.
        optimizer: updates `model`.
        guard: of the optimizer's steps.
        max_norm: largest L2 norm of the clipped gradients.
        sources: S, the largest number of sources of a stage.
        float8_gather: FSDP2 gathers weights in float8, whose scales an update changes.
        trained: which of the weights the optimizer updates; None: all.
    """

    def __init__(
        self,
        *,
        model: LanguageModel,
        runner: ModelRunner,
        optimizer: AdamW,
        guard: UpdateGuard,
        mesh: Mesh,
        max_norm: float,
        sources: int = 1,
        float8_gather: bool = False,
        trained: TrainedWeights | None = None,
    ) -> None:
        self.model = model
        self.runner = runner
        self.optimizer = optimizer
        self.guard = guard
        self.mesh = mesh
        self.max_norm = max_norm
        self.float8_gather = float8_gather
        self.trained = TrainedWeights(model, optimizer) if trained is None else trained
        self._loss = torch.zeros((), device=mesh.process.device)
        self.sums_S2 = torch.zeros(sources, 2, dtype=torch.float64, device=mesh.process.device)

    def restart(self) -> None:
        """Call before the first step, and after anything but `update` has changed weights or optimizer: no effect."""

    def backward(self, batch: Batch, *, step_tokens: int, first: bool) -> None:
        """Accumulate a micro-batch's gradients and its share of the batch's mean loss.

        Args:
            step_tokens: target tokens of the global batch.
            first: it is the step's first micro-batch.
        """
        if first:
            self.sums_S2 = torch.zeros_like(self.sums_S2)
        share = self.runner.backward(batch, step_tokens, self.sums_S2)
        self._loss = share if first else self._loss + share

    def update(self) -> StepResult:
        """Clip, check and apply the gradients, then clear them. A non-finite loss or gradient changes nothing."""
        return self.apply_gradients(self._loss, self.sums_S2)

    def apply_gradients(self, loss: Tensor, sums_S2: Tensor) -> StepResult:
        """`update`, given this rank's loss and sums."""
        loss = self.mesh.sum_loss(loss)
        if self.trained.is_partial:
            self.trained.prepare_gradients()
        grad_norm = clip_grad_norm(self.model, self.max_norm, self.mesh.pipeline, optimizer=self.optimizer)
        loss = loss.to(grad_norm.device)  # with CPU offload the gradient norm is on the CPU
        health = self.guard.observe(loss, grad_norm)
        self.optimizer.step()
        if self.float8_gather:
            refresh_scales(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        if self.trained.is_partial:
            self.trained.clear_gradients()
        return StepResult(loss, grad_norm, health, sums_S2)


def local_tokens(tokens_BL: Tensor, mesh: Mesh) -> Tensor:
    """This rank's positions of a batch, on its device; without context parallelism all positions."""
    tokens_BL = tokens_BL.to(mesh.process.device, non_blocking=True)
    if mesh.parallel_dims.cp == 1:
        return tokens_BL
    positions = local_positions(tokens_BL.shape[1], mesh.coordinates.context, mesh.parallel_dims.cp)
    return tokens_BL[:, positions.to(tokens_BL.device)]


def local_inputs(tokens_BL: Tensor, mesh: Mesh, *, padding: int = 0) -> Tensor:
    """`local_tokens`, padded at the end to a multiple of the tensor-parallel degree, as sequence parallelism requires.

    Causal attention never attends to the padding, and `unpadded` removes it from the logits: it changes no value.
    """
    tokens_BL = local_tokens(tokens_BL, mesh)
    return F.pad(tokens_BL, (0, -tokens_BL.shape[1] % mesh.parallel_dims.tp), value=padding)


def local_documents(batch: Batch, mesh: Mesh) -> dict[str, Any]:
    """The model's arguments for documents, as `local_inputs`; empty without documents. Padding is its own document."""
    padding = {"starts_BL": batch.inputs_BL.shape[1], "positions_BL": 0}
    given = {name: tensor_BL for name in padding if (tensor_BL := getattr(batch, name)) is not None}
    local = {name: local_inputs(tensor_BL, mesh, padding=padding[name]) for name, tensor_BL in given.items()}
    return local if batch.bounds is None else {**local, "bounds": batch.bounds}


def source_sums(sources_B: Tensor | None, sums_S2: Tensor | None) -> SourceSums | None:
    """Where the loss of a micro-batch is added by source; None if nobody wants that."""
    if sources_B is None or sums_S2 is None:
        return None
    return SourceSums(sums_S2, sources_B.to(sums_S2.device, non_blocking=True))


def unpadded(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """The logits without those of the padding that `local_inputs` added."""
    return logits_BLV if logits_BLV.shape[1] == targets_BL.shape[1] else logits_BLV[:, : targets_BL.shape[1]]


def sharded_loss(mesh: Mesh) -> AbstractContextManager[object]:
    """Context in which torch computes the cross-entropy of logits that are sharded over the vocabulary."""
    return loss_parallel() if mesh.parallel_dims.tp > 1 and mesh.parallel_dims.loss_parallel else nullcontext()


def losses_by_sequence(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """The summed loss of every sequence in nats, [B]."""
    logits_BLV = unpadded(logits_BLV, targets_BL)
    return torch.stack(
        [summed_cross_entropy(logits_BLV[b : b + 1], targets_BL[b : b + 1]) for b in range(len(targets_BL))]
    )
