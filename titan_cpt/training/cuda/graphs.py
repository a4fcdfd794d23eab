"""CUDA graphs of a training step: captured once, then replayed with three launches instead of two thousand.

Three graphs in one memory pool, replayed in the order in which they were captured:

- the step's first micro-batch: forward and backward, which write the gradients;
- each further micro-batch: forward and backward, which add to them;
- the update: norm, clipping, guard, AdamW.

A replay runs the kernels of the eager step on the same addresses, so its results are the same bits. What changes from
step to step is in tensors that exist before the capture: tokens, LR, loss, and the guard's state. Everything else is a
constant of the capture, and `restart` discards the graphs when it may have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from titan_cpt.data.batch import Batch
from titan_cpt.distributed.master_weights import ComputeCopy
from titan_cpt.errors import ConfigError
from titan_cpt.training.cuda.adamw import TritonAdamW
from titan_cpt.training.forward_backward import EagerStep, StepResult

EAGER_STEPS = 2
"""Steps before the capture: they compile, choose kernels and allocate workspaces, which a capture cannot."""


class Graphs(Protocol):
    """How to capture and replay work: `CudaGraphs`, or a test's recorder of operations on a CPU."""

    def run(self, work: Callable[[], None]) -> None:
        """Do the work now, on the stream of the captures."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record the work without doing it; returns a function that does it again on the same memory."""

    def release(self) -> None:
        """Free the captured graphs and their memory, after their last replay has ended."""


class CudaGraphs:
    """torch's CUDA graphs, of one device, in one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def run(self, work: Callable[[], None]) -> None:
        """Do the work on the captures' stream: its cuBLAS workspaces exist when the capture begins."""
        caller = torch.cuda.current_stream()
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            work()
        caller.wait_stream(self._stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture the work.

        Raises:
            ConfigError: an operation of the work cannot be captured, or memory does not suffice.
        """
        graph = torch.cuda.CUDAGraph()
        # "thread_local": threads that pin batches or write checkpoints may call CUDA during the capture.
        capture = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
        try:
            with capture:
                work()
        except RuntimeError as error:
            raise ConfigError(
                f"training.cuda_graphs: a step of this config cannot be captured: {_first_cause(error)}. Remove the key"
            ) from error
        self._graphs.append(graph)
        return graph.replay

    def release(self) -> None:
        """Wait for the device, and free the graphs."""
        torch.cuda.synchronize()
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle()


def _first_cause(error: BaseException) -> str:
    """First line of the error that broke a capture; when the capture ends, torch raises another one without a cause."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


class CapturedStep:
    """A step that is captured after `EAGER_STEPS` eager ones, and replayed from then on. In a single process only.

    Eager and captured steps run the same methods on the same tensors, so that a resumed run, which takes eager steps
    where the uninterrupted one replayed, has the same losses.

    Args:
        eager: the step to capture.
        compute_copy: of the model, with mixed precision.
        graphs: how to capture.
    """

    def __init__(self, eager: EagerStep, compute_copy: ComputeCopy | None, graphs: Graphs) -> None:
        self.eager = eager
        self.compute_copy = compute_copy
        self.graphs = graphs
        device = eager.mesh.process.device
        self._loss = torch.zeros((), device=device)
        self._result = torch.zeros(4, device=device)  # loss, gradient norm, and the two of `UpdateGuard.observe`
        # torch's fused AdamW reads an LR tensor on a GPU as float32, on a CPU as float64.
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        self._lrs = [torch.zeros((), dtype=dtype, device=device) for _ in eager.optimizer.param_groups]
        if isinstance(eager.optimizer, TritonAdamW):
            eager.optimizer.uploads = False  # `update` does it, outside of the capture
        self._sums_S2 = torch.zeros_like(eager.sums_S2)
        self._batch: Batch | None = None
        self._step_tokens = 0
        self._replays: dict[Callable[[], None], Callable[[], None]] = {}
        self._steps = 0

    def restart(self) -> None:
        """Discard the graphs: the next steps are eager, and then captured anew.

        Call it before the first step of a stage, whose hyperparameters are constants of a capture, and after a
        checkpoint was loaded, which can replace the optimizer's tensors.
        """
        self._replays.clear()
        self.graphs.release()
        self._batch = None
        self._steps = 0

    def backward(self, batch: Batch, *, step_tokens: int, first: bool) -> None:
        """As `EagerStep.backward`; micro-batches have one shape between two calls of `restart`.

        The number of tokens of a step is a constant of the capture: where a batch-size ramp changes it, steps are
        captured anew.
        """
        if self._step_tokens != step_tokens and self._batch is not None:
            assert first, "all micro-batches of a step have the same number of tokens of the step"
            self.restart()
        self._step_tokens = step_tokens
        tensors = batch.tensors  # without the bounds of the documents, which would be constants of the capture
        if self._batch is None:
            device = self._loss.device
            empty = {name: torch.empty_like(tensor, device=device) for name, tensor in tensors.items()}
            self._batch = replace(batch, **empty, bounds=None)
        for name, tensor in tensors.items():
            static = getattr(self._batch, name)
            assert static.shape == tensor.shape, f"a capture has one batch shape; got {tensor.shape}"
            # Pinned memory is not reused before the copy has ended: torch's allocator records that.
            static.copy_(tensor, non_blocking=True)
        self._run(self._first if first else self._further)

    def update(self) -> StepResult:
        """As `EagerStep.update`; the result is a copy, which the next step does not overwrite."""
        optimizer = self.eager.optimizer
        for lr, group in zip(self._lrs, optimizer.param_groups, strict=True):
            lr.fill_(group["lr"])
        if isinstance(optimizer, TritonAdamW):
            optimizer.write_hyperparameters()
            if self._update not in self._replays:  # replays read gradients where the capture did
                optimizer.write_addresses()
        self._run(self._update)
        if self.compute_copy is not None:
            self.compute_copy.note_update()
        self._steps += 1
        loss, grad_norm, *health = self._result.clone()
        return StepResult(loss, grad_norm, torch.stack(health), self._sums_S2.clone())

    def _run(self, work: Callable[[], None]) -> None:
        if self._steps < EAGER_STEPS:
            self.graphs.run(work)
            return
        if work not in self._replays:
            self._replays[work] = self.graphs.capture(work)
        self._replays[work]()

    def _first(self) -> None:
        if self.compute_copy is not None:
            self.compute_copy.note_update()  # every replay casts the weights, even if a validation had just cast them
        self._sums_S2.zero_()
        self._loss.copy_(self._share())

    def _further(self) -> None:
        self._loss.add_(self._share())

    def _share(self) -> Tensor:
        assert self._batch is not None, "`backward` has set it"
        return self.eager.runner.backward(self._batch, self._step_tokens, self._sums_S2)

    def _update(self) -> None:
        with self._lr_on_device():
            result = self.eager.apply_gradients(self._loss, self._sums_S2)
        assert result.health is not None, "this batch was not skipped"
        self._result.copy_(torch.cat([torch.stack([result.loss, result.grad_norm]), result.health]))

    @contextmanager
    def _lr_on_device(self) -> Iterator[None]:
        """Let torch's AdamW read its LR from device memory; elsewhere it stays a float, which is logged."""
        if isinstance(self.eager.optimizer, TritonAdamW):
            yield
            return
        groups = self.eager.optimizer.param_groups
        lrs = [group["lr"] for group in groups]
        capturing = self._loss.is_cuda and torch.cuda.is_current_stream_capturing()
        for group, lr in zip(groups, self._lrs, strict=True):
            group.update(lr=lr, capturable=capturing)
        try:
            yield
        finally:
            for group, lr in zip(groups, lrs, strict=True):
                group.update(lr=lr, capturable=False)
