"""Attention inside 16 equal documents against attention across them: one layer's attention, and the whole step.

The goal is that of one layer's attention: masked at least 1.5 times as fast as the fastest unmasked kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from speed import profiled

if TYPE_CHECKING:
    from check import Context

DOCUMENTS = 16
GOAL = 1.5
# Sequences, positions, heads, key/value heads, head width: attention of a race's shape, and of one long sequence.
ATTENTION = {
    "G405": (8, 2048, 16, 16, 64),
    "L1B": (4, 2048, 32, 4, 64),
    "W4096": (2, 4096, 32, 8, 128),
    "16,384 tokens": (1, 16384, 32, 8, 128),
}
TINY = {"tiny": (2, 64, 4, 2, 16)}
STEPS = ("L1B", "L1B@16384")


def run(context: Context) -> None:
    """One layer's attention of each shape, then whole steps."""
    for name, sizes in (TINY if context.tiny else ATTENTION).items():
        _attention(context, name, sizes)
    for shape in ("tiny",) if context.tiny else STEPS:
        if context.left_s < 40 and not context.tiny:
            context.skip(f"{shape}: whole step", "no time left: check.sh --only documents")
            continue
        _whole_step(context, shape)


def _attention(context: Context, name: str, sizes: tuple[int, ...]) -> None:
    found = context.call(attention_times, context.device, sizes, log=f"attention-{name}")
    context.figures[name] = found
    for kind, times in found.items():
        for kernel, time in times.items():
            context.row(f"{name}, {kind}: {kernel}", value=time if isinstance(time, str) else f"{time:.3f} ms")
    plain, masked = (fastest(found[kind]) for kind in ("unmasked", "masked"))
    if plain is None or masked is None:
        context.row(f"goal {name}: masked attention", value="no kernel", ok=False)
        return
    ratio = plain[1] / masked[1]
    verdict = "a dry run's figure" if context.tiny else "met" if ratio >= GOAL else "missed"
    context.row(
        f"goal {name}: masked attention",
        value=f"{verdict}: {ratio:.2f}x, {masked[0]} over {plain[0]}",
        expected=f">= {GOAL}x",
    )


def _whole_step(context: Context, shape: str) -> None:
    found = {}
    for kind, settings in (("across", {}), ("inside", {"training.document_mask": "true"})):
        found[kind] = profiled(context, shape, f"{shape}-{kind}", settings, documents=DOCUMENTS)
    context.figures[f"{shape}, whole step"] = found
    ratio = found["inside"]["tokens_per_s"] / found["across"]["tokens_per_s"]
    context.row(
        f"{shape}: whole step, masked over unmasked",
        value=f"{ratio:.3f}x, {found['inside']['tokens_per_s']:,.0f} tokens/s",
    )


def fastest(times: dict[str, float | str]) -> tuple[str, float] | None:
    """The fastest kernel and its time; None if no kernel computes this attention."""
    measured = {name: time for name, time in times.items() if not isinstance(time, str)}
    return min(measured.items(), key=lambda item: item[1]) if measured else None


def attention_times(device: str, sizes: tuple[int, int, int, int, int]) -> dict[str, dict[str, float | str]]:
    """Milliseconds of forward and backward of every kernel without and with documents, or why there is no time."""
    import torch

    from titan_cpt.distributed.attention_backend import attention_kernels_of
    from titan_cpt.distributed.attention_timing import AttentionShape, time_ms
    from titan_cpt.distributed.document_backend import Circumstances, document_kernels_of
    from titan_cpt.models.build import build_model
    from titan_cpt.models.registry import named_size

    model = build_model(named_size("llama", "debug", 257, {}))  # its attention takes any heads
    place = torch.device(device)
    shape = AttentionShape(*sizes, torch.bfloat16 if device == "cuda" else torch.float32)
    kernels = {
        "unmasked": attention_kernels_of(model),
        "masked": document_kernels_of(model, shape, place, Circumstances()),
    }
    if device == "cuda":  # its scores of long sequences do not fit into memory
        kernels = {kind: {name: of[name] for name in of if name != "math"} for kind, of in kernels.items()}
    return {kind: {name: time_ms(of[name], shape, place) for name in of} for kind, of in kernels.items()}
