"""Megatron-LM: batch size and its ramp-up. Source: core/num_microbatches_calculator.py of core_v0.16.0."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from titan_cpt.convert.conversion import Conversion
from titan_cpt.convert.shared import pipelined, set_batch

RAMP = "rampup-batch-size"
_MOST_SIZES = 1000  # of one ramp: a table that long is a mistake in the file


def set_batches(out: Conversion, world_size: int | None) -> int:
    """[training] batch sizes, and the stage's ramp if there is one; returns the global batch size after it.

    Args:
        world_size: number of ranks there; None: torchrun's arguments in the script, or the fewest possible.
    """
    degrees = ("tensor-model-parallel-size", "pipeline-model-parallel-size", "context-parallel-size")
    model_ranks = 1
    for key in degrees:
        model_ranks *= max(out.whole(key, 1), 1)
    ranks = world_size
    launcher = [key for key in ("nproc_per_node", "nproc-per-node", "nnodes") if out.has(key)]
    if ranks is None and launcher and all(str(out.value(key)).isdigit() for key in launcher):
        ranks = 1
        for key in launcher:
            ranks *= max(out.whole(key), 1)
    data_parallel = max((ranks or model_ranks) // model_ranks, 1)
    micro = out.whole("micro-batch-size", 1) or 1
    sequences = out.whole("global-batch-size", micro * data_parallel)
    ramp = _ramp(out, sequences)
    smallest = math.gcd(*ramp.values()) if ramp else sequences
    how = f"{sequences} sequences; micro-batch {micro} x {data_parallel} data-parallel ranks x accumulation"
    pipeline = out.whole("pipeline-model-parallel-size", 1)
    local = pipelined(out, pipeline, micro, max(smallest // data_parallel, 1))
    keys = ["global-batch-size", "micro-batch-size"]
    set_batch(out, sequences=sequences, micro=local, ranks=data_parallel, of=keys, how=how)
    if ramp and smallest % (local * data_parallel):
        out.remark(
            f"Not all batch sizes of the ramp are multiples of {data_parallel} ranks x {local} sequences: change a "
            "size, the local batch size or the number of ranks."
        )
    return int(sequences)


def _ramp(out: Conversion, sequences: int) -> Mapping[str, int]:
    """The stage's ramp, from tokens to sequences, listed; empty without one.

    With n = (last - first) / increment steps of the batch size over S samples, Megatron-LM trains with

        first + increment * int(samples done / (S / n))

    so the k-th size begins at the first step after k S / n samples, which a threshold in tokens says exactly.
    """
    if not out.has(RAMP):
        return {}
    found = out.value(RAMP)
    words = [str(word) for word in found] if isinstance(found, list) else str(found).split()
    if len(words) != 3 or not all(word.isdigit() and len(word) < 19 for word in words):
        out.no_counterpart(RAMP, "three whole numbers in the script can be converted: write stages.global_batch_size")
        return {}
    first, increment, samples = map(int, words)
    sizes, remainder = divmod(sequences - first, increment) if increment else (0, 1)
    if remainder or not 0 < sizes <= _MOST_SIZES or not first or not samples:
        out.no_counterpart(RAMP, f"no ramp from {first} to {sequences} sequences, which Megatron-LM refuses too")
        return {}
    if not out.has("train-samples"):
        out.no_counterpart(RAMP, "Megatron-LM allows it with --train-samples only")
        return {}
    seq_len = out.whole("seq-length", 1024)
    ramp = {
        str(math.ceil(Fraction(samples * size, sizes)) * seq_len): first + increment * size for size in range(sizes + 1)
    }
    text = (
        "each size begins with the same step as there. The learning rate is a function of the samples there and of the "
        "steps here, so the two differ while the batch grows; phases end at the same tokens"
    )
    out.decide(text, {"stage.global_batch_size": ramp}, of=[RAMP])
    return ramp
