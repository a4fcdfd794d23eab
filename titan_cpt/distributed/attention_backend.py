"""The kernel of scaled dot-product attention (SDPA): a chosen one, or the fastest of those that this device has.

torch chooses by fixed rules. Which kernel is fastest depends on the device, the shape and the dtype, so "fastest"
measures forward and backward of one layer's attention once, on rank 0, and all ranks use its choice.

Shape letters: B sequences, L positions, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend

from titan_cpt.distributed.process_group import ProcessInfo, raise_on_all_ranks
from titan_cpt.errors import ConfigError
from titan_cpt.models.common.language_model import LanguageModel
from titan_cpt.models.common.layers import RotaryCausalAttention

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_CANDIDATES = {"cuda": ("cudnn", "flash", "efficient"), "cpu": ("flash", "math")}  # math needs B N L L numbers
_REPETITIONS = 20
_SECONDS = 0.4  # for one backend; at least three repetitions
_KEY = "training.attention_backend"


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
    """The result of `choose_attention_backend`.

    Attributes:
        backend: a key of `BACKENDS`.
        note: the measured times, for the user; empty if nothing was measured.
    """

    backend: str
    note: str = ""


def set_attention_backend(models: Iterable[LanguageModel], backend: str) -> None:
    """Compute the attention of these models with one of `BACKENDS` only, whether or not they are compiled."""
    for model in models:
        for block_attention in model.attentions():
            cast(RotaryCausalAttention, block_attention.core).backend = BACKENDS[backend]


def choose_attention_backend(
    requested: str,
    recorded: object,
    model: LanguageModel,
    shape: AttentionShape,
    process: ProcessInfo,
    *,
    group: dist.ProcessGroup | None = None,
) -> AttentionChoice:
    """The backend to use, equal on all ranks; collective.

    Args:
        requested: one of `BACKENDS`, or "fastest".
        recorded: the backend that an earlier session of the run has measured to be the fastest: it is used again, so
            that the resumed run computes the same bits, unless this device does not have it.
        model: whose attention is measured; its weights are not used.
        group: a gloo group of all ranks, to broadcast the choice.

    Raises:
        ConfigError: this device has no such kernel for this shape; the message lists the others.
    """
    device = process.device
    choices: list[AttentionChoice | None] = [None]
    with raise_on_all_ranks():
        if requested != "fastest":
            choices = [_require(requested, model, shape, device)]
        elif process.rank == 0:
            choices = [_fastest(recorded, model, shape, device)]
    if dist.is_initialized():
        dist.broadcast_object_list(choices, src=0, group=group)
    choice = choices[0]
    assert choice is not None, "rank 0 has chosen"
    return choice


def _require(backend: str, model: LanguageModel, shape: AttentionShape, device: torch.device) -> AttentionChoice:
    problem = _time_ms(backend, model, shape, device, repetitions=1)
    if not isinstance(problem, str):
        return AttentionChoice(backend)
    others = [other for other in _CANDIDATES[device.type] if other != backend]
    working = [other for other in others if not isinstance(_time_ms(other, model, shape, device, repetitions=1), str)]
    raise ConfigError(
        f'{_KEY}: "{backend}" does not compute this attention ({shape}) on this device: {problem}. Available: '
        f"{', '.join(working) or 'none'}; or remove the key"
    )


def _fastest(recorded: object, model: LanguageModel, shape: AttentionShape, device: torch.device) -> AttentionChoice:
    if isinstance(recorded, str) and recorded in BACKENDS:
        problem = _time_ms(recorded, model, shape, device, repetitions=1)
        if not isinstance(problem, str):
            return AttentionChoice(recorded)
    measured = {name: _time_ms(name, model, shape, device) for name in _CANDIDATES[device.type]}
    times = {name: found for name, found in measured.items() if not isinstance(found, str)}
    if not times:
        raise ConfigError(
            f'{_KEY}: "fastest" found no kernel for this attention ({shape}): {next(iter(measured.values()))}. Remove '
            "the key"
        )
    fastest = min(times, key=lambda name: times[name])
    return AttentionChoice(fastest, _note(fastest, measured, shape))


def _note(fastest: str, measured: Mapping[str, float | str], shape: AttentionShape) -> str:
    lines = [f"attention is computed by {fastest}, the fastest for {shape}; forward and backward of one layer:"]
    for name, found in measured.items():
        lines.append(f"  {name:10s} {'not available' if isinstance(found, str) else f'{found:.3f} ms'}")
    return "\n".join(lines)


def _time_ms(
    backend: str,
    model: LanguageModel,
    shape: AttentionShape,
    device: torch.device,
    *,
    repetitions: int = _REPETITIONS,
) -> float | str:
    """Median time of forward and backward of one layer's attention, or the reason why the backend cannot compute it."""
    core = cast(RotaryCausalAttention, model.attentions()[0].core)
    before = core.backend
    core.backend = BACKENDS[backend]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of every reason against every kernel
            _forward_and_backward(core, shape, device)
            _wait(device)
            return _median_ms(core, shape, device, repetitions)
    except RuntimeError as error:  # a shape or dtype without kernel, no deterministic backward pass, or no memory
        return str(error).splitlines()[0].rstrip(".")
    finally:
        core.backend = before


def _median_ms(core: RotaryCausalAttention, shape: AttentionShape, device: torch.device, repetitions: int) -> float:
    inputs = _inputs(shape, device)
    begin = time.perf_counter()
    _forward_and_backward(core, shape, device, inputs)
    _wait(device)
    repetitions = min(repetitions, max(3, int(_SECONDS / (time.perf_counter() - begin))))
    if device.type == "cuda":  # queued without waiting, so that the host's launches do not count
        events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]  # type: ignore[no-untyped-call]
        events[0].record()
        for event in events[1:]:
            _forward_and_backward(core, shape, device, inputs)
            event.record()
        _wait(device)
        return statistics.median(float(first.elapsed_time(second)) for first, second in pairwise(events))
    found = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        _forward_and_backward(core, shape, device, inputs)
        found.append(1000 * (time.perf_counter() - begin))
    return statistics.median(found)


def _forward_and_backward(
    core: RotaryCausalAttention,
    shape: AttentionShape,
    device: torch.device,
    inputs: tuple[Tensor, ...] | None = None,
) -> None:
    q_BNLH, k_BKLH, v_BKLH = inputs or _inputs(shape, device)
    out_BNLH = core.attend(q_BNLH, k_BKLH, v_BKLH)
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
