"""How long attention takes: forward and backward of one layer, and the choice among several kernels by it.

Shape letters: B sequences, L positions, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_cpt.distributed.process_group import ProcessInfo, raise_on_all_ranks
from titan_cpt.errors import ConfigError

KEY = "training.attention_backend"
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A kernel: out_BNLH of q_BNLH, k_BKLH and v_BKLH. A RuntimeError says why it cannot compute them."""
_REPETITIONS = 20
_SECONDS = 0.4  # for one kernel; at least three repetitions


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one rank's attention in one forward pass.

    Attributes:
        sequences: B.
        positions: L.
        heads: N.
        key_value_heads: K.
        head_width: H.
        dtype: of queries, keys and values.
    """

    sequences: int
    positions: int
    heads: int
    key_value_heads: int
    head_width: int
    dtype: torch.dtype

    def __str__(self) -> str:
        """The sizes as a message has them."""
        return (
            f"{self.sequences} x {self.positions} positions, {self.heads} heads of {self.head_width} "
            f"({self.key_value_heads} key/value heads), {str(self.dtype).removeprefix('torch.')}"
        )


@dataclass(frozen=True)
class AttentionChoice:
    """The result of a choice.

    Attributes:
        backend: name of the chosen kernel.
        note: the measured times, for the user; empty if nothing was measured.
    """

    backend: str
    note: str = ""


def choose_kernel(
    requested: str,
    recorded: object,
    kernels: Mapping[str, Attend],
    shape: AttentionShape,
    process: ProcessInfo,
    *,
    candidates: Iterable[str],
    group: dist.ProcessGroup | None = None,
) -> AttentionChoice:
    """The kernel to use, equal on all ranks; collective.

    Args:
        requested: name of a kernel, or "fastest".
        recorded: the kernel that an earlier session of the run has measured to be the fastest: it is used again, so
            that the resumed run computes the same bits, unless this device does not have it.
        kernels: all kernels by name.
        candidates: the kernels among which the fastest is chosen, and that a message recommends.
        group: a gloo group of all ranks, to broadcast the choice.

    Raises:
        ConfigError: this device has no such kernel for this shape; the message lists the others.
    """
    choices: list[AttentionChoice | None] = [None]
    measured = {name: kernels[name] for name in candidates}
    with raise_on_all_ranks():
        if requested != "fastest":
            choices = [_require(requested, kernels[requested], measured, shape, process.device)]
        elif process.rank == 0:
            known = kernels.get(recorded) if isinstance(recorded, str) else None
            choices = [_fastest(str(recorded), known, measured, shape, process.device)]
    if dist.is_initialized():
        dist.broadcast_object_list(choices, src=0, group=group)
    choice = choices[0]
    assert choice is not None, "rank 0 has chosen"
    return choice


def _require(
    name: str, kernel: Attend, others: Mapping[str, Attend], shape: AttentionShape, device: torch.device
) -> AttentionChoice:
    problem = time_ms(kernel, shape, device, repetitions=1)
    if not isinstance(problem, str):
        return AttentionChoice(name)
    working = [
        other
        for other, attend in others.items()
        if other != name and not isinstance(time_ms(attend, shape, device, repetitions=1), str)
    ]
    raise ConfigError(
        f'{KEY}: "{name}" does not compute this attention ({shape}) on this device: {problem}. Available: '
        f"{', '.join(working) or 'none'}; or remove the key"
    )


def _fastest(
    recorded: str, known: Attend | None, kernels: Mapping[str, Attend], shape: AttentionShape, device: torch.device
) -> AttentionChoice:
    if known is not None:
        problem = time_ms(known, shape, device, repetitions=1)
        if not isinstance(problem, str):
            return AttentionChoice(recorded)
    measured = {name: time_ms(attend, shape, device) for name, attend in kernels.items()}
    times = {name: found for name, found in measured.items() if not isinstance(found, str)}
    if not times:
        raise ConfigError(
            f'{KEY}: "fastest" found no kernel for this attention ({shape}): {next(iter(measured.values()))}. Remove '
            "the key"
        )
    fastest = min(times, key=lambda name: times[name])
    return AttentionChoice(fastest, _note(fastest, measured, shape))


def _note(fastest: str, measured: Mapping[str, float | str], shape: AttentionShape) -> str:
    lines = [f"attention is computed by {fastest}, the fastest for {shape}; forward and backward of one layer:"]
    for name, found in measured.items():
        lines.append(f"  {name:10s} {'not available' if isinstance(found, str) else f'{found:.3f} ms'}")
    return "\n".join(lines)


def time_ms(
    attend: Attend, shape: AttentionShape, device: torch.device, *, repetitions: int = _REPETITIONS
) -> float | str:
    """Median time of forward and backward of one layer's attention, or the reason why it cannot be computed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of every reason against every kernel
            _forward_and_backward(attend, _inputs(shape, device))
            _wait(device)
            return _median_ms(attend, shape, device, repetitions)
    except RuntimeError as error:  # a shape or dtype without kernel, no deterministic backward pass, or no memory
        return str(error).splitlines()[0].rstrip(".")


def _median_ms(attend: Attend, shape: AttentionShape, device: torch.device, repetitions: int) -> float:
    inputs = _inputs(shape, device)
    begin = time.perf_counter()
    _forward_and_backward(attend, inputs)
    _wait(device)
    repetitions = min(repetitions, max(3, int(_SECONDS / (time.perf_counter() - begin))))
    if device.type == "cuda":  # queued without waiting, so that the host's launches do not count
        events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]  # type: ignore[no-untyped-call]
        events[0].record()
        for event in events[1:]:
            _forward_and_backward(attend, inputs)
            event.record()
        _wait(device)
        return statistics.median(float(first.elapsed_time(second)) for first, second in pairwise(events))
    found = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        _forward_and_backward(attend, inputs)
        found.append(1000 * (time.perf_counter() - begin))
    return statistics.median(found)


def _forward_and_backward(attend: Attend, inputs: tuple[Tensor, ...]) -> None:
    q_BNLH, k_BKLH, v_BKLH = inputs
    out_BNLH = attend(q_BNLH, k_BKLH, v_BKLH)
    torch.autograd.grad(out_BNLH, (q_BNLH, k_BKLH, v_BKLH), grad_outputs=torch.ones_like(out_BNLH))


def _inputs(shape: AttentionShape, device: torch.device) -> tuple[Tensor, ...]:
    """Random q_BNLH, k_BKLH, v_BKLH. They do not come from torch's global generator, which the run's seed governs."""
    generator = torch.Generator(device).manual_seed(0)
    heads = (shape.heads, shape.key_value_heads, shape.key_value_heads)
    sizes = [(shape.sequences, count, shape.positions, shape.head_width) for count in heads]
    return tuple(
        torch.randn(size, generator=generator, dtype=shape.dtype, device=device).requires_grad_() for size in sizes
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
