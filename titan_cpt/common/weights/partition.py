"""What a stage trains: which weights, in which rows, with which factor of the learning rate. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from titan_cpt.common.weights.patterns import NEW_ROWS, matches, short_list, specificity, with_range_ends

TRAINABLE = "trainable"
LR_SCALE = "lr_scale"
FIRST_NEW_ROW = "trainable.first_new_row"
"""Keys of a stage's recipe; the last one only where a pattern selects new rows."""


@dataclass(frozen=True)
class Part:
    """Rows of a weight that the optimizer updates with one learning rate.

    Attributes:
        rows: the first row and the one behind the last; None: the whole weight.
        scale: factor of the stage's learning rate.
        pattern: the one of lr_scale that gives the scale; None for 1 because none matches.
    """

    rows: tuple[int, int] | None = None
    scale: float = 1.0
    pattern: str | None = None


WHOLE = (Part(),)
"""A weight that is trained as a whole, with the stage's learning rate."""


@dataclass(frozen=True)
class Partition:
    """The trained parts of every weight of the model.

    Attributes:
        sizes: shape of every weight, by its name in the whole model.
        parts: the parts of every weight; none for a frozen one.
    """

    sizes: Mapping[str, tuple[int, ...]]
    parts: Mapping[str, tuple[Part, ...]]

    @property
    def is_trivial(self) -> bool:
        """Whether all weights are trained alike, as without a partition."""
        every = (part for parts in self.parts.values() for part in parts)
        return all(self.parts.values()) and all(part.rows is None and part.scale == 1 for part in every)

    @property
    def scales(self) -> dict[str, float]:
        """The patterns of lr_scale that some trained part follows, with their factors."""
        every = (part for parts in self.parts.values() for part in parts if part.pattern is not None)
        return {part.pattern: part.scale for part in every if part.pattern is not None}

    def rows(self, name: str) -> tuple[int, int]:
        """The first trained row of a weight, and the one behind the last; (0, 0) if it is frozen."""
        parts = self.parts[name]
        if not parts:
            return 0, 0
        bounds = [part.rows or (0, self.sizes[name][0]) for part in parts]
        return min(first for first, _ in bounds), max(stop for _, stop in bounds)

    def elements(self, name: str) -> int:
        """Number of trained elements of a weight."""
        first, stop = self.rows(name)
        return (stop - first) * math.prod(self.sizes[name][1:])

    @property
    def parameters(self) -> int:
        """Number of trained elements of all weights."""
        return sum(self.elements(name) for name in self.sizes)

    @property
    def trains_only_new_rows(self) -> bool:
        """Whether no weight is changed that the model had before its tokenizer was extended."""
        trained = [part for name, parts in self.parts.items() for part in parts if name in NEW_ROWS.values()]
        return len(trained) == sum(map(len, self.parts.values())) and all(
            part.rows and part.rows[0] for part in trained
        )

    def saved_state_bytes(self, *, muon: bool) -> int:
        """Bytes of the optimizer state in a checkpoint: two float32 moments of every weight that is not frozen.

        They have the whole weight's shape, also where only some rows are trained. Muon has one for matrices of blocks.
        """
        total = 0
        for name, size in self.sizes.items():
            of_muon = muon and len(size) == 2 and name.startswith("blocks.")
            total += math.prod(size) * (4 if of_muon else 8) * bool(self.parts[name])
        return total

    @property
    def description(self) -> str:
        """What is trained, such as "2 of 98 weights, 1,234 of 410,000 parameters; LR x 0.5 blocks.0-3"."""
        trained = sum(1 for parts in self.parts.values() if parts)
        every = sum(math.prod(size) for size in self.sizes.values())
        scales = ", ".join(f"x {scale:g} {pattern}" for pattern, scale in self.scales.items())
        text = f"{trained:,} of {len(self.sizes):,} weights, {self.parameters:,} of {every:,} parameters"
        return f"{text}; LR {scales}" if scales else text


def trained_alike(name: str, one: Partition | None, other: Partition | None) -> bool:
    """Whether two stages train a weight in the same rows; None trains all weights whole."""
    given = [partition for partition in (one, other) if partition is not None]
    if len(given) == 2:
        return given[0].rows(name) == given[1].rows(name)
    return all(partition.rows(name) == (0, partition.sizes[name][0]) for partition in given)


def make_partition(
    sizes: Mapping[str, tuple[int, ...]],
    *,
    trainable: Sequence[str] | None,
    lr_scale: Mapping[str, float] | None,
    first_new_row: int | None,
) -> Partition:
    """The partition that the patterns describe, which `partition_problems` has checked.

    Args:
        sizes: shape of every weight.
        trainable: patterns of what is trained; None: everything.
        lr_scale: pattern -> factor of the learning rate; the pattern with the most components decides.
        first_new_row: first row of a new id in embedding and head; None without an extended tokenizer.
    """
    scales = lr_scale or {}
    parts: dict[str, tuple[Part, ...]] = {}
    for name, size in sizes.items():
        new = next((each for each, weight in NEW_ROWS.items() if weight == name and first_new_row is not None), None)
        whole = trainable is None or any(matches(pattern, name) for pattern in trainable)
        rows_of_new = (first_new_row or 0, size[0])
        if whole:
            old_part = _part(name, None, scales)
            new_part = _part(name, new, scales)
            if old_part.scale == new_part.scale:
                parts[name] = (old_part,)
            else:
                parts[name] = (
                    Part((0, rows_of_new[0]), old_part.scale, old_part.pattern),
                    Part(rows_of_new, new_part.scale, new_part.pattern),
                )
        elif new is not None and trainable is not None and new in trainable:
            part = _part(name, new, scales)
            parts[name] = (Part(rows_of_new, part.scale, part.pattern),)
        else:
            parts[name] = ()
    return Partition(sizes, parts)


def partition_of_recipe(
    recipe: Mapping[str, Any], stage: str, sizes: Mapping[str, tuple[int, ...]]
) -> Partition | None:
    """What a stage of a checkpoint's recipe trained; None: all weights, alike."""
    trainable = recipe.get(f"stages.{stage}.{TRAINABLE}")
    lr_scale = recipe.get(f"stages.{stage}.{LR_SCALE}")
    if trainable is None and lr_scale is None:
        return None
    first = recipe.get(f"stages.{stage}.{FIRST_NEW_ROW}")
    return make_partition(sizes, trainable=trainable, lr_scale=lr_scale, first_new_row=first)


def partition_problems(
    sizes: Mapping[str, tuple[int, ...]],
    *,
    trainable: Sequence[str] | None,
    lr_scale: Mapping[str, float] | None,
    first_new_row: int | None,
    tied: bool,
) -> Iterator[str]:
    """Messages for patterns that select nothing or contradict each other, each beginning with its key."""
    known = [*sizes, *(new for new, weight in NEW_ROWS.items() if first_new_row is not None and weight in sizes)]
    unknown = False
    for key, patterns in ((TRAINABLE, trainable or ()), (LR_SCALE, lr_scale or {})):
        for pattern in patterns:
            why = _selects_nothing(pattern, sizes, first_new_row=first_new_row, tied=tied)
            if why is not None:
                unknown = True
                yield f"{key}: {pattern!r} {why}; there are {short_list(known)}"
    if not unknown and lr_scale:
        given = make_partition(sizes, trainable=trainable, lr_scale=lr_scale, first_new_row=first_new_row)
        contradictions = list(_contradictions(given, lr_scale))
        yield from contradictions
        for pattern in lr_scale if not contradictions else ():
            why = _why_without_effect(pattern, lr_scale[pattern], given)
            if why is not None:
                yield f"{LR_SCALE}: {pattern!r} has no effect: {why}"


def _selects_nothing(
    pattern: str, sizes: Mapping[str, tuple[int, ...]], *, first_new_row: int | None, tied: bool
) -> str | None:
    """Why a pattern, or an end of its range, selects no weight and no rows; None if all of it does."""
    if tied and pattern.split(".")[0] == "head":
        shared = ".".join(["embedding", *pattern.split(".")[1:]])
        return f"matches no weight: the head of this model is tied to the embedding, so write {shared!r} instead"
    if pattern not in NEW_ROWS:
        beyond = [each for each in with_range_ends(pattern) if not any(matches(each, name) for name in sizes)]
        if not any(matches(pattern, name) for name in sizes):
            return "matches no weight"
        return f"is a range that ends where {beyond[0]!r} matches no weight" if beyond else None
    if first_new_row is None:
        return "selects the rows of new ids, and without [tokenizer] extend there are none"
    return None


def _contradictions(partition: Partition, lr_scale: Mapping[str, float]) -> Iterator[str]:
    """A message for each pair of patterns that are equally specific, with other factors, for one weight."""
    seen = set()
    for name, parts in partition.parts.items():
        for part in parts:
            if part.pattern is None:
                continue
            for other in _matching(name, part.pattern if part.pattern in NEW_ROWS else None, lr_scale):
                equal = specificity(other) == specificity(part.pattern)
                pair = frozenset((other, part.pattern))
                if equal and lr_scale[other] != part.scale and pair not in seen:
                    seen.add(pair)
                    yield (
                        f"{LR_SCALE}: {part.pattern!r} = {part.scale:g} and {other!r} = {lr_scale[other]:g} both match "
                        f"{name}, with equally many components: make one of them longer, or remove one"
                    )


def _why_without_effect(pattern: str, scale: float, partition: Partition) -> str | None:
    """Why no trained part follows a pattern; None if one does, or one has the same factor anyway."""
    selected = [name for name in partition.sizes if matches(pattern, name) or NEW_ROWS.get(pattern) == name]
    parts = [part for name in selected for part in partition.parts[name]]
    if not parts:
        return f"{TRAINABLE} freezes what it selects; remove it, or add it to {TRAINABLE}"
    if all(part.scale != scale for part in parts):
        return "longer patterns decide for everything that it selects; remove it"
    return None


def _matching(name: str, new: str | None, lr_scale: Mapping[str, float]) -> list[str]:
    """The patterns of lr_scale for a weight, or for its new rows."""
    return [pattern for pattern in lr_scale if matches(pattern, name) or (new is not None and pattern == new)]


def _part(name: str, new: str | None, lr_scale: Mapping[str, float]) -> Part:
    """A whole weight, or its new rows, with the factor of the most specific pattern."""
    found = _matching(name, new, lr_scale)
    if not found:
        return Part()
    pattern = max(found, key=lambda each: (specificity(each), each))
    return Part(None, lr_scale[pattern], pattern)
