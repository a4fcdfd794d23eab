"""Forward and backward of one local batch, with or without a pipeline, and the same for measuring a loss.

Both runners have `backward`, for training, and `per_sequence_loss`, for validation. B sequences, L positions.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
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

from titan_cpt.distributed.context_parallel import own_positions
from titan_cpt.distributed.device_mesh import Mesh
from titan_cpt.distributed.master_weights import ComputeCopy
from titan_cpt.distributed.options import ParallelOptions
from titan_cpt.errors import ConfigError
from titan_cpt.models.build import LanguageModel
from titan_cpt.training.loss import fused_linear_cross_entropy, summed_cross_entropy


class SingleStageRunner:
    """A model whose layers all lie on this rank, whatever else is split.

    Args:
        model: what runs.
        copy: how the weights of `model` follow the trained ones, where these are others.
    """

    def __init__(
        self, model: nn.Module, mesh: Mesh, copy: ComputeCopy | None = None, *, compiled: bool = False
    ) -> None:
        self.model, self.mesh, self.copy, self.compiled = model, mesh, copy, compiled

    def backward(self, inputs_BL: Tensor, targets_BL: Tensor, step_tokens: int) -> Tensor:
        """Add this batch's gradients to those there are; returns its share of the step's mean loss, on this rank.

        Args:
            step_tokens: target tokens of the whole optimizer step, by which the summed loss is divided.
        """
        inputs_BL, targets_BL = own_inputs(inputs_BL, self.mesh), own_part(targets_BL, self.mesh)
        if self.copy is not None:
            self.copy.refresh()
            self.copy.take_gradients()
        with sharded_loss(self.mesh):
            if self.mesh.parallel_dims.tp > 1:  # the head's rows lie on several ranks
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
        """The summed loss of every sequence, nats_B, the same on all ranks that share the batch; collective."""
        inputs_BL, targets_BL = own_inputs(inputs_BL, self.mesh), own_part(targets_BL, self.mesh)
        if self.copy is not None:
            self.copy.refresh()
        with sharded_loss(self.mesh):
            nats_B = losses_by_sequence(self.model(inputs_BL), targets_BL)
        if self.mesh.context is not None:
            dist.all_reduce(nats_B, group=self.mesh.context)
        return nats_B


class PipelineRunner:
    """A model whose layers lie on several ranks, trained by a schedule of torch.distributed.pipelining.

    Args:
        stages: the stages on this rank, by number, each laid over the other dimensions already.
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
            scale_grads=False,  # the loss is a share of the step's mean already
        )

    @property
    def last(self) -> nn.Module | None:
        """The stage that ends in the logits, on the rank that holds it."""
        return self.stages.get(self.mesh.parallel_dims.pipeline_stages - 1)

    def backward(self, inputs_BL: Tensor, targets_BL: Tensor, step_tokens: int) -> Tensor:
        """As `SingleStageRunner.backward`, for batches of one size; the share is 0 on ranks without the last stage."""
        self._step_tokens = step_tokens
        inputs = (own_inputs(inputs_BL, self.mesh),) if 0 in self.stages else ()
        target = own_part(targets_BL, self.mesh) if self.last is not None else None
        losses: list[Tensor] | None = [] if self.last is not None else None
        with sharded_loss(self.mesh):
            self._schedule.step(*inputs, target=target, losses=losses, return_outputs=False)
        return torch.stack(losses).detach().sum() if losses else torch.zeros((), device=self.mesh.process.device)

    @torch.no_grad()
    def per_sequence_loss(self, inputs_BL: Tensor, targets_BL: Tensor) -> Tensor:
        """As `SingleStageRunner.per_sequence_loss`. Stage after stage, by micro-batches, without overlap.

        `schedule.eval` fails for the V schedules (torch 2.13), and after it the next step finds out all shapes anew.
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
        """The logits, on the rank with the last stage."""
        me, length = (
            self.mesh.process.rank,
            tokens_BL.shape[1] // self.mesh.parallel_dims.tp,
        )
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
    """The positions of a batch that this rank holds, on its device: all, but under context parallelism."""
    tokens_BL = tokens_BL.to(mesh.process.device, non_blocking=True)
    if mesh.parallel_dims.cp == 1:
        return tokens_BL
    positions = own_positions(tokens_BL.shape[1], mesh.coordinates.context, mesh.parallel_dims.cp)
    return tokens_BL[:, positions.to(tokens_BL.device)]


def own_inputs(tokens_BL: Tensor, mesh: Mesh) -> Tensor:
    """`own_part`, filled up at the end to as many positions as sequence parallelism can cut into equal pieces.

    Causal attention never looks at what was filled in, and `unpadded` takes it from the logits: no number changes.
    """
    tokens_BL = own_part(tokens_BL, mesh)
    return F.pad(tokens_BL, (0, -tokens_BL.shape[1] % mesh.parallel_dims.tp))


def unpadded(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """The logits of the positions that have a target."""
    return logits_BLV if logits_BLV.shape[1] == targets_BL.shape[1] else logits_BLV[:, : targets_BL.shape[1]]


def sharded_loss(mesh: Mesh) -> AbstractContextManager[object]:
    """Within it the cross-entropy of logits sharded over the vocabulary is known to torch, forward and backward."""
    return loss_parallel() if mesh.parallel_dims.tp > 1 and mesh.parallel_dims.loss_parallel else nullcontext()


def losses_by_sequence(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """The summed loss of every sequence by itself, nats_B."""
    logits_BLV, sequences = unpadded(logits_BLV, targets_BL), range(len(targets_BL))
    return torch.stack([summed_cross_entropy(logits_BLV[b : b + 1], targets_BL[b : b + 1]) for b in sequences])


def require_compiler(device: torch.device) -> None:
    """That torch.compile finds what it compiles with: g++ or CXX for a CPU; Triton, and a C compiler, for CUDA.

    Raises:
        ConfigError: it does not; torch would say so in a traceback of the first step.
    """
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "compile.enable: needs Triton, which comes with torch's CUDA builds: `pip install triton`, or leave it out"
        )
    variable, names = ("CC", ("gcc", "clang", "cc")) if device.type == "cuda" else ("CXX", ("g++",))
    chosen = os.environ.get(variable)
    if not any(map(shutil.which, (chosen,) if chosen else names)):
        what = f"{variable}={chosen}, which is not there" if chosen else f"none of {', '.join(names)} is there"
        raise ConfigError(
            f"compile.enable: torch.compile needs a compiler, and {what}: install one (apt install g++, module load "
            f"gcc, conda install gxx), name one in {variable}, or leave the key out"
        )
