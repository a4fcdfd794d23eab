"""Patterns of weights: `embedding`, `blocks.0-3`, `blocks.*.attention`, `head.new`. No torch.

A pattern is compared with a weight's name component by component, and matches every name that begins with it. In a
component `*` stands for any characters, and `3-7` for the numbers from 3 to 7. `embedding.new` and `head.new` are not
names but rows of a weight: those of the ids that an extended tokenizer adds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

NEW_ROWS = {"embedding.new": "embedding.weight", "head.new": "head.weight"}
"""Pattern of new rows -> the weight that has them."""

_RANGE = re.compile(r"([0-9]+)-([0-9]+)")
_COMPONENT = re.compile(r"[A-Za-z0-9_*]+")


def pattern_problem(pattern: str) -> str | None:
    """What is wrong with the syntax of a pattern; None if it is valid."""
    for component in pattern.split("."):
        bounds = _RANGE.fullmatch(component)
        if bounds is not None:
            if int(bounds[1]) > int(bounds[2]):
                return f"{pattern!r}: the range {component!r} is empty: write the smaller number first"
        elif not _COMPONENT.fullmatch(component):
            return (
                f"{pattern!r}: is not a pattern of weights: write components joined by '.', each a name, '*' for any "
                "characters, or a range of numbers such as '0-3'"
            )
    return None


def matches(pattern: str, name: str) -> bool:
    """Whether a weight's name begins with the pattern; patterns of new rows match no name."""
    wanted, found = pattern.split("."), name.split(".")
    if pattern in NEW_ROWS or len(wanted) > len(found):
        return False
    return all(_component_matches(one, other) for one, other in zip(wanted, found, strict=False))


def with_range_ends(pattern: str) -> list[str]:
    """The patterns of both ends of a pattern's ranges: `blocks.0` and `blocks.3` of `blocks.0-3`; without one, none."""
    components = pattern.split(".")
    bounds = [_RANGE.fullmatch(component) for component in components]
    if not any(bounds):
        return []
    return [
        ".".join(each if found is None else found[end] for each, found in zip(components, bounds, strict=True))
        for end in (1, 2)
    ]


def specificity(pattern: str) -> int:
    """By how many components the pattern selects: of two that match, the one with more decides.

    New rows are part of a weight, so that their patterns have one component more than the weight's name.
    """
    return len(NEW_ROWS.get(pattern, pattern).split(".")) + (pattern in NEW_ROWS)


def short_list(names: Sequence[str]) -> str:
    """The names in one line, those of the blocks once: "embedding.weight, blocks.0-5.mlp.up.weight, ..."."""
    blocks: dict[str, list[int]] = {}
    for name in names:
        layer, rest = _block(name)
        if layer is not None:
            blocks.setdefault(rest, []).append(layer)
    shown: dict[str, None] = {}
    for name in names:
        layer, rest = _block(name)
        if layer is None:
            shown[name] = None
        else:
            layers = blocks[rest]
            span = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
            contiguous = layers == list(range(layers[0], layers[-1] + 1))
            shown[f"blocks.{span}.{rest}" if contiguous else name] = None
    return ", ".join(shown)


def _block(name: str) -> tuple[int | None, str]:
    """The layer of a block's weight and its name in the block; (None, name) of other weights."""
    first, _, rest = name.partition(".")
    layer, _, inner = rest.partition(".")
    return (int(layer), inner) if first == "blocks" and layer.isdecimal() else (None, name)


def _component_matches(wanted: str, found: str) -> bool:
    bounds = _RANGE.fullmatch(wanted)
    if bounds is not None:
        return found.isdecimal() and int(bounds[1]) <= int(found) <= int(bounds[2])
    if "*" in wanted:
        return re.fullmatch(".*".join(map(re.escape, wanted.split("*"))), found) is not None
    return wanted == found
