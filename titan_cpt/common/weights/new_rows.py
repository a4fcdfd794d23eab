"""The rows of new tokens that a stage initializes in the embedding and the output layer, and their description."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

NewRowsKind: TypeAlias = Literal["pieces", "mean", "normal"]

_DESCRIPTIONS = {
    "pieces": "each the mean of its pieces' rows",
    "mean": "each the mean of the old rows",
    "normal": "drawn with the old rows' mean and standard deviation in each column",
}


@dataclass(frozen=True)
class NewRowsPlan:
    """Rows of new tokens that a stage initializes: checkpoint/vocabulary/new_rows.py.

    Attributes:
        kind: how they are computed.
        first: the first new id.
        end: the number of ids; further rows are padding.
        if_of_base: only if the initial weights were trained with the base tokenizer, which is known when they are read.
    """

    kind: NewRowsKind
    first: int
    end: int
    if_of_base: bool = False


def describe_new_rows(kind: NewRowsKind, new: int, *, without_pieces: int = 0, padding: int, tied: bool) -> str:
    """New rows in words.

    Args:
        kind: how they are computed.
        new: their number.
        without_pieces: the number of new tokens that no token of the base stands for.
        padding: rows that have no token.
        tied: the embedding is the output layer too.
    """
    weights = "the embedding (tied)" if tied else "embedding and head"
    text = f"{new:,} new row{'s' * (new != 1)} of {weights}, {_DESCRIPTIONS[kind]}"
    if without_pieces:
        text += f" ({without_pieces:,} without pieces: the mean of the old rows)"
    return text + (f"; {padding:,} padding row{'s' * (padding != 1)}: the mean of the old rows" if padding else "")


def new_rows_in(weights: str) -> str | None:
    """What `describe_new_rows` says in a `transition` event's `weights`; None if no rows were initialized."""
    found = re.search(r"[\d,]+ new rows? of [^;]*(; [\d,]+ padding rows?: [^;]*)?", weights)
    return found[0] if found else None
