"""Time of a training step on one GPU by kind of kernel: FLOPs and bytes counted from the model, rates from a trace.

    products             6 FLOPs a token and weight of a matrix, the head included
    attention            causal, forward 2 L D S FLOPs a token, backward 5 L D S (it multiplies the scores again)
    everything else      bytes read and written / bandwidth, each tensor counted once per kernel that needs it
    gaps                 launches a block x time between two kernels

`MEASURED` is one session on one H200 (docs/performance_gpu.md, "The first session"), titan_cpt at commit 987a5cd. Later
builds write fewer bytes (docs/performance_gpu.md lists how); no GPU measured them, so this describes that commit.
D, A, K, F: widths of model, queries, keys and MLP; L layers; S sequence length; V vocabulary; T tokens; P parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from titan_cpt.models.common.loss_chunks import LOGITS_CHUNK
from titan_cpt.models.registry import named_size
from titan_cpt.models.spec import ModelSpec

PRODUCTS, FORWARD, BACKWARD = "matrix products", "attention, forward", "attention, backward"
NORMS = "norms, rotary, residuals, bias sums"
LAUNCHES = "gaps between kernels"
_BF16 = 2


@dataclass(frozen=True)
class Trace:
    """A measured compiled step: milliseconds of GPU time by kind, and of the whole step; launches with memsets."""

    name: str
    spec: ModelSpec
    seq_len: int
    sequences: int
    ms: Mapping[str, float]
    busy_ms: float
    wall_ms: float
    launches: int
    eager_tokens_per_s: float

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.seq_len * self.sequences

    @property
    def chunks(self) -> int:
        """Pieces in which that commit computed the logits, on a GPU as on a CPU."""
        return -(-self.tokens * self.spec.vocab_size // LOGITS_CHUNK)

    def measured_ms(self) -> dict[str, float]:
        """Milliseconds by kind: `ms`, what is left of the busy time (norms and the like), and the gaps."""
        rest = self.busy_ms - sum(self.ms.values())
        return {**self.ms, NORMS: rest, LAUNCHES: self.wall_ms - self.busy_ms}


def _ms(*values: float) -> dict[str, float]:
    kinds = (PRODUCTS, BACKWARD, FORWARD, "AdamW", "clipping", "norm of the gradients", "cast of the weights")
    kinds += ("cast of the gradients", "head, weight gradient", "head, softmax", "activation function")
    return dict(zip(kinds, values, strict=True))


MEASURED = (
    Trace(
        "G405",
        named_size("gpt_neox", "405m", 50_304),
        2048,
        8,
        _ms(43.9, 13.1, 4.5, 3.4, 0.9, 0.5, 0.6, 1.8, 2.3, 2.1, 2.3 + 4.0),
        busy_ms=89.0,
        wall_ms=93.9,
        launches=1965 + 370,
        eager_tokens_per_s=121_800,
    ),
    Trace(
        "L1B",
        named_size(
            "llama",
            "debug",
            32_000,
            {"layers": 22, "width": 2048, "heads": 32, "kv_heads": 4, "mlp_width": 5632, "vocab_size": 32_000},
        ),
        2048,
        4,
        _ms(65.5, 12.7, 4.2, 9.1, 2.4, 1.2, 1.8, 3.8, 0.7, 0.6, 1.4 + 2.3),
        busy_ms=115.3,
        wall_ms=120.8,
        launches=1965 + 390,
        eager_tokens_per_s=52_700,
    ),
)


@dataclass(frozen=True)
class Rates:
    """The fitted constants, in FLOP/s, bytes/s, seconds and counts."""

    products: float
    attention_forward: float
    attention_backward: float
    bandwidth: float
    gap_s: float
    launches_per_block: float
    eager_passes: float
    """Further reads or writes of the residual stream [T, D] a block that eager execution costs."""

    def scaled(self, *, flops: float, bandwidth: float) -> Rates:
        """The rates of a GPU whose data sheet has `flops` times these FLOP/s and `bandwidth` times these bytes/s."""
        return Rates(
            self.products * flops,
            self.attention_forward * flops,
            self.attention_backward * flops,
            self.bandwidth * bandwidth,
            self.gap_s,
            self.launches_per_block,
            self.eager_passes,
        )


def matrix_weights(spec: ModelSpec) -> int:
    """Elements of the weights that tokens are multiplied with: every matrix of the blocks, and the head."""
    block = sum(parameter.elements for parameter in spec.block_parameters() if len(parameter.size) == 2)
    return spec.layers * block + spec.embedding_parameters


def flops(spec: ModelSpec, *, tokens: float, seq_len: int) -> dict[str, float]:
    """FLOPs by kind of a forward and backward pass; half of the scores are masked and not computed."""
    scores = spec.layers * spec.attention_width * min(seq_len, spec.sliding_window or seq_len) * tokens
    return {PRODUCTS: 6 * matrix_weights(spec) * tokens, FORWARD: 2 * scores, BACKWARD: 5 * scores}


def passes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Elements a token that the other kernels of a compiled block read and write, forward and backward.

    GELU: F in, F out; backward its input and the gradient in, F out. SiLU: gate and up in, the product out; backward
    these and the gradient in, two gradients out.

    GPT-NeoX, forward: residual and branches in, residual and two norms out (6 D); queries, keys and values in and out
    (6 D). Backward: the latter again; the norms' gradients, input and residual gradient in, one out (5 D), once more
    for their weights (3 D); each gradient in for the sums of the biases (5 D + F).

    Llama, forward: residual and branch in, residual and norm out, twice (8 D); queries and keys in and out (2 A + 2 K).
    Backward: the latter again; five products' gradients, and of both norms input and residual gradient in, one out
    (11 D), once more for the norms' weights (7 D).
    """
    d, f = spec.width, spec.mlp_width
    if spec.family == "gpt_neox":
        return {"activation function": (2 * f, 3 * f), NORMS: (12 * d, 19 * d + f)}
    rotated = 2 * (spec.attention_width + spec.kv_width)
    return {"activation function": (3 * f, 5 * f), NORMS: (8 * d + rotated, 18 * d + rotated)}


def update_bytes(spec: ModelSpec, *, parameters: int, head_share: float = 1.0) -> dict[str, float]:
    """Bytes of one update of `parameters` float32 weights, those that one GPU holds.

    AdamW reads weight, gradient and moments, writes all but the gradient (28); clipping reads and writes a gradient
    (8), its norm reads it (4); casts read 4 and write 2 bytes, or the reverse. The head's gradient is float32 already.
    """
    cast = parameters - spec.embedding_parameters * head_share
    return {
        "AdamW": 28 * parameters,
        "clipping": 8 * parameters,
        "norm of the gradients": 4 * parameters,
        "cast of the weights": 6 * parameters,
        "cast of the gradients": 6 * max(cast, 0.0),
    }


def token_bytes(spec: ModelSpec, *, tokens: float, chunks: int, recomputed: bool = False) -> dict[str, float]:
    """Bytes of the head and of the blocks' other kernels for `tokens` tokens in bf16.

    Head: a chunk's bf16 weight gradient is read and added to the float32 sum (10 bytes; the first is cast: 6); softmax
    reads the logits for the largest, for the sum and for the gradient, which it writes. `recomputed`: the blocks'
    forward runs twice.
    """
    counts = {
        "head, weight gradient": float((10 * (chunks - 1) + 6) * spec.embedding_parameters),
        "head, softmax": 4 * _BF16 * spec.vocab_size * tokens,
    }
    for kind, (forward, backward) in passes(spec).items():
        counts[kind] = _BF16 * spec.layers * tokens * (forward * (2 if recomputed else 1) + backward)
    return counts


def _bytes(trace: Trace) -> dict[str, float]:
    updated = update_bytes(trace.spec, parameters=trace.spec.parameters)
    return updated | token_bytes(trace.spec, tokens=trace.tokens, chunks=trace.chunks)


def fitted(traces: Iterable[Trace]) -> Rates:
    """Each constant from sums over the traces: work / time of the kernels that do it."""
    sums = dict.fromkeys((PRODUCTS, FORWARD, BACKWARD, "bytes", "moving", "gap", "launches", "blocks"), 0.0)
    times = dict.fromkeys((PRODUCTS, FORWARD, BACKWARD), 0.0)
    streams = eager_s = 0.0
    for trace in traces:
        measured = trace.measured_ms()
        for kind, count in flops(trace.spec, tokens=trace.tokens, seq_len=trace.seq_len).items():
            sums[kind] += count
            times[kind] += measured[kind] / 1e3
        for kind, count in _bytes(trace).items():
            sums["bytes"] += count
            sums["moving"] += measured[kind] / 1e3
        sums["gap"] += measured[LAUNCHES] / 1e3
        sums["launches"] += trace.launches
        sums["blocks"] += trace.spec.layers
        streams += _BF16 * trace.spec.layers * trace.spec.width * trace.tokens
        eager_s += trace.tokens / trace.eager_tokens_per_s - trace.wall_ms / 1e3
    bandwidth = sums["bytes"] / sums["moving"]
    return Rates(
        products=sums[PRODUCTS] / times[PRODUCTS],
        attention_forward=sums[FORWARD] / times[FORWARD],
        attention_backward=sums[BACKWARD] / times[BACKWARD],
        bandwidth=bandwidth,
        gap_s=sums["gap"] / sums["launches"],
        launches_per_block=sums["launches"] / sums["blocks"],
        eager_passes=eager_s * bandwidth / streams,
    )


def step_ms(trace: Trace, rates: Rates) -> dict[str, float]:
    """Milliseconds of a compiled step by kind, as the constants have it; the keys are those of `measured_ms`."""
    speed = {PRODUCTS: rates.products, FORWARD: rates.attention_forward, BACKWARD: rates.attention_backward}
    count = flops(trace.spec, tokens=trace.tokens, seq_len=trace.seq_len)
    times = {kind: 1e3 * count[kind] / speed[kind] for kind in count}
    times |= {kind: 1e3 * moved / rates.bandwidth for kind, moved in _bytes(trace).items()}
    return times | {LAUNCHES: 1e3 * trace.spec.layers * rates.launches_per_block * rates.gap_s}


def eager_ms(trace: Trace, rates: Rates) -> float:
    """Milliseconds of an eager step."""
    stream = _BF16 * trace.spec.layers * trace.spec.width * trace.tokens
    return sum(step_ms(trace, rates).values()) + 1e3 * rates.eager_passes * stream / rates.bandwidth


def report() -> list[str]:
    """Lines of two tables: rate and error of each kind, and each fit's errors on both models."""
    lines = ["MEASURED on one H200 at commit 987a5cd (ms). The work is COUNTED from the model; rate = work / ms.",
             "Error: of the ms that the constants FITTED to the other model only give.", ""]  # fmt: skip
    lines += ["| kind | G405 ms | rate | error | L1B ms | rate | error |", "|---" * 7 + "|"]
    columns = [_column(trace, other) for trace, other in zip(MEASURED, reversed(MEASURED), strict=True)]
    lines += [f"| {kind} | {columns[0][kind]} | {columns[1][kind]} |" for kind in columns[0]]
    lines += ["", "FITTED to one model and TESTED on the other, then fitted to both: errors of the estimate.", ""]
    lines += [
        "| fitted to | tested on | measured ms | estimated | error | products | attention | memory | gaps | eager |"
    ]
    lines += ["|---" * 10 + "|"]
    return lines + [_errors(source, trace) for source in (*((t,) for t in MEASURED), MEASURED) for trace in MEASURED]


def _column(trace: Trace, other: Trace) -> dict[str, str]:
    """By kind: measured milliseconds, the rate, and the error of the constants fitted to `other`."""
    measured, estimate = trace.measured_ms(), step_ms(trace, fitted((other,)))
    cells = {}
    for kind, count in flops(trace.spec, tokens=trace.tokens, seq_len=trace.seq_len).items():
        cells[kind] = f"{count / measured[kind] / 1e9:.0f} TFLOP/s"
    for kind, count in _bytes(trace).items():
        cells[kind] = f"{count / measured[kind] / 1e9:.2f} TB/s"
    cells[LAUNCHES] = f"{trace.launches:,} x {1e3 * measured[LAUNCHES] / trace.launches:.1f} us"
    return {kind: f"{measured[kind]:.1f} | {rate} | {estimate[kind] / measured[kind] - 1:+.0%}"
            for kind, rate in cells.items()}  # fmt: skip


def _errors(source: tuple[Trace, ...], trace: Trace) -> str:
    rates = fitted(source)
    estimate, measured = step_ms(trace, rates), trace.measured_ms()
    groups = [(PRODUCTS,), (FORWARD, BACKWARD), tuple(_bytes(trace)), (LAUNCHES,)]
    step = sum(estimate.values())
    eager = eager_ms(trace, rates) / (1e3 * trace.tokens / trace.eager_tokens_per_s)
    errors = [sum(estimate[k] for k in group) / sum(measured[k] for k in group) - 1 for group in groups]
    cells = [f"{trace.wall_ms:.1f}", f"{step:.1f}"]
    cells += [f"{error:+.1%}" for error in (step / trace.wall_ms - 1, *errors, eager - 1)]
    name = " and ".join(t.name for t in source)
    test = trace.name if trace not in source else f"{trace.name} (in the fit)"
    return f"| {name} | {test} | " + " | ".join(cells) + " |"
