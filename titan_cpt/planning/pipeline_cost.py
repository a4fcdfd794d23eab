"""Cost of a pipeline schedule: the fraction of time that ranks are idle, and the activations in flight.

Closed forms; torch's schedules are tables of actions per rank. A test simulates those tables action by action and
compares the results.

Letters: p pipeline ranks, m micro-batches, v pipeline stages per rank.
"""

from __future__ import annotations

from titan_cpt.distributed.parallel_dims import ParallelDims


def bubble(dims: ParallelDims) -> float:
    """The fraction of a step's time in which a pipeline rank is idle: idle / (3 v m + idle).

    The unit of time is the forward pass of one micro-batch through one pipeline stage. Gradients of its inputs take one
    unit, gradients of its weights another, communication none. The idle time is

        3 (p - 1)                                       GPipe, 1F1B
        3 (p - 1) + 3 (v - 1) max(0, p - m)             LoopedBFS, Interleaved1F1B
        max(p - 1 + 2 max(0, p - m), 4 (p - m) - 1)     InterleavedZeroBubble
        max(p - 1, 4 p - 2 m - 2)                       ZBVZeroBubble
        2 (p - 1)                                       DualPipeV, whose paired passes run one after the other here

    including p - 1 units before the first micro-batch arrives, which the zero-bubble papers do not count.
    Source of the first three for m >= p: Narayanan et al. 2021, arXiv:2104.04473, section 2.2; Qi et al. 2024,
    arXiv:2401.10241. The others, and fewer micro-batches, from the tables of torch 2.13.
    """
    p, m, v = dims.pp, dims.microbatches, dims.schedule_kind.stages_per_rank
    if p == 1:
        return 0.0
    missing = max(0, p - m)
    match dims.schedule:
        case "InterleavedZeroBubble":
            idle = max(p - 1 + 2 * missing, 4 * missing - 1)
        case "ZBVZeroBubble":
            idle = max(p - 1, 4 * p - 2 * m - 2)
        case "DualPipeV":
            idle = 2 * (p - 1)
        case _:
            idle = 3 * (p - 1) + 3 * (v - 1) * missing
    return idle / (3 * v * m + idle)


def in_flight(dims: ParallelDims, rank: int) -> int:
    """Peak number of (micro-batch, pipeline stage) pairs whose activations a pipeline rank holds.

    Activations count until the gradients of the stage's weights are computed. For ZBVZeroBubble with fewer than 2 p - 1
    micro-batches this is an upper bound, exact for the last rank.
    """
    p, v = dims.pp, dims.schedule_kind.stages_per_rank
    all_pairs = dims.microbatches * v
    per_round = dims.microbatches // max(1, dims.microbatches // p)  # before an Interleaved schedule's next stage
    match dims.schedule if p > 1 else "":
        case "":
            return 1
        case "1F1B":
            return min(all_pairs, p - rank)
        case "Interleaved1F1B":
            return min(all_pairs, (v - 1) * per_round + 2 * (p - rank - 1) + 1)
        case "InterleavedZeroBubble":
            return min(all_pairs, (v - 1) * per_round + p)
        case "ZBVZeroBubble":
            return min(all_pairs, v * p)
        case "DualPipeV":
            return min(all_pairs, v * p + 1)
    return all_pairs  # GPipe, LoopedBFS
