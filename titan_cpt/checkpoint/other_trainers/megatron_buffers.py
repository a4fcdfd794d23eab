"""Megatron-LM's flat buffers: where each parameter is in those that its distributed optimizer saves.

The optimizer concatenates all parameters of a rank, last one first, and saves one tensor for each bucket of them. It
does not save where a parameter is; the rules below say so, and the buffers of the weights prove it: what is found for a
parameter must be its weight.
Source: core/distributed/param_and_grad_buffer.py, core/optimizer/distrib_optimizer.py of core_v0.16.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

_ALIGNMENT = 64
"""A parameter begins at a multiple of this number of elements from its bucket's start."""

Place = tuple[int, int]
"""A bucket and the offset in it."""


def places_in_buckets(sizes: Mapping[str, int], buckets: Sequence[int]) -> dict[str, Place] | None:
    """Where parameters are in buckets that were saved one by one.

    Args:
        sizes: name -> elements, in the model's order.
        buckets: elements of each bucket, without the padding at its end.

    Returns:
        Name -> place; None: the buckets are not made of these parameters.
    """
    found: dict[str, Place] = {}
    bucket, end = 0, 0
    for name, elements in reversed(list(sizes.items())):
        start = _aligned(end)
        if bucket < len(buckets) and end and start + elements > buckets[bucket]:
            if buckets[bucket] not in (end, start):
                return None
            bucket, start = bucket + 1, 0
        if bucket >= len(buckets) or start + elements > buckets[bucket]:
            return None
        found[name] = bucket, start
        end = start + elements
    complete = bucket == len(buckets) - 1 and buckets[bucket] == end
    return found if complete else None


def places_in_joined_buckets(
    sizes: Mapping[str, int], length: int, is_there: Callable[[str, int], bool]
) -> dict[str, Place] | None:
    """Where parameters are in buckets that were joined to one tensor, which no longer says where a bucket begins.

    Args:
        sizes: name -> elements, in the model's order.
        length: elements of the tensor.
        is_there: whether the weight `name` begins at an offset of the tensor with the weights.

    Returns:
        Name -> place in bucket 0; None: the weights are not there.
    """
    order = list(sizes)[::-1]
    path: list[tuple[int, int]] = []  # of the parameters so far: their bucket's start, their own start
    untried = [_starts(0, 0)]
    while untried:
        if len(untried) > len(order):
            last = order[-1]
            if path[-1][1] + sizes[last] == length:
                return {name: (0, start) for name, (_, start) in zip(order, path, strict=True)}
            untried.pop()
            path.pop()
            continue
        name = order[len(untried) - 1]
        if not untried[-1]:
            untried.pop()
            if path:
                path.pop()
            continue
        bucket, start = untried[-1].pop(0)
        if start + sizes[name] <= length and is_there(name, start):
            path.append((bucket, start))
            untried.append(_starts(bucket, start + sizes[name]))
    return None


def _starts(bucket: int, end: int) -> list[tuple[int, int]]:
    """Where the next parameter can begin: in this bucket, or, as the first of a new one, right here."""
    aligned = bucket + _aligned(end - bucket)
    return [(bucket, aligned), (end, end)] if end > bucket else [(bucket, aligned)]


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
