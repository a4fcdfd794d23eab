"""What a pipeline schedule costs beside its work: the time that its ranks stand idle, and the activations they hold.

Both are worked out in closed form where torch's schedules are tables of actions for each rank; a test plays those
tables through, action by action, and finds the same numbers.

Letters: p pipeline ranks, m micro-batches, v stages a rank.
"""

from __future__ import annotations

from titan_cpt.distributed.parallel_dims import ParallelDims


def bubble(layout: ParallelDims) -> float:
    """The share of a step's time in which a pipeline rank waits, idle / (3 v m + idle).

    The unit is one stage's forward pass of one micro-batch; the gradients of its inputs take one more, those of its
    weights another, and sending takes no time. Idle are

        3 (p - 1)                                       GPipe, 1F1B
        3 (p - 1) + 3 (v - 1) max(0, p - m)             LoopedBFS, Interleaved1F1B
        max(p - 1 + 2 max(0, p - m), 4 (p - m) - 1)     InterleavedZeroBubble
        max(p - 1, 4 p - 2 m - 2)                       ZBVZeroBubble
        2 (p - 1)                                       DualPipeV, whose pairs of passes run one after the other here

    of which p - 1 are the wait for the first micro-batch: the zero-bubble papers do not count them, a clock does.
    Source of the first three for m >= p: Narayanan et al. 2021, arXiv:2104.04473, section 2.2; Qi et al. 2024,
    arXiv:2401.10241. The others, and fewer micro-batches, from the tables of torch 2.13.
    """
    p, m, v = layout.pp, layout.microbatches, layout.schedule_kind.stages_per_rank
    if p == 1:
        return 0.0
    missing = max(0, p - m)
    match layout.schedule:
        case "InterleavedZeroBubble":
            idle = max(p - 1 + 2 * missing, 4 * missing - 1)
        case "ZBVZeroBubble":
            idle = max(p - 1, 4 * p - 2 * m - 2)
        case "DualPipeV":
            idle = 2 * (p - 1)
        case _:
            idle = 3 * (p - 1) + 3 * (v - 1) * missing
    return idle / (3 * v * m + idle)


def in_flight(layout: ParallelDims, rank: int) -> int:
    """Micro-batches x stages whose activations a pipeline rank holds at once, at most.

    A stage's activations count until the gradients of its weights are there. With fewer than 2 p - 1 micro-batches the
    first ranks of ZBVZeroBubble hold less than is said here, the last one as much.
    """
    p, v = layout.pp, layout.schedule_kind.stages_per_rank
    all_of_them = layout.microbatches * v
    of_a_round = layout.microbatches // max(1, layout.microbatches // p)  # before an Interleaved schedule's next stage
    match layout.schedule if p > 1 else "":
        case "":
            return 1
        case "1F1B":
            return min(all_of_them, p - rank)
        case "Interleaved1F1B":
            return min(all_of_them, (v - 1) * of_a_round + 2 * (p - rank - 1) + 1)
        case "InterleavedZeroBubble":
            return min(all_of_them, (v - 1) * of_a_round + p)
        case "ZBVZeroBubble":
            return min(all_of_them, v * p)
        case "DualPipeV":
            return min(all_of_them, v * p + 1)
    return all_of_them  # GPipe, LoopedBFS
