"""Encoded texts: their ids in the smallest dtype, concatenated, with the marks that begin and end each document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.integer[Any]]


class Encoded(NamedTuple):
    """Encoded texts."""

    ids: Ids
    """Ids of all texts, concatenated; uint16, or int32 for a vocabulary of more than 65,536 entries."""
    lengths: npt.NDArray[np.int64]
    """Number of ids of each text."""
    lost: dict[int, str]
    """Index of a text -> its characters that became the unknown token or no token."""


def id_dtype(vocab_size: int) -> type[np.integer[Any]]:
    """Return the smallest dtype of the files that `prepare` writes which holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def joined(
    parts: Sequence[Sequence[Ids]],
    dtype: type[np.integer[Any]],
    *,
    begin: Sequence[int] = (),
    end: Sequence[int] = (),
    lost: dict[int, str] | None = None,
) -> Encoded:
    """Concatenate the ids of texts.

    Args:
        parts: the ids of each text, in one array or several.
        dtype: the dtype of the result.
        begin: ids before each text.
        end: ids after each text.
        lost: see Encoded.
    """
    first = np.array(begin, dtype=dtype)
    last = np.array(end, dtype=dtype)
    marks = len(first) + len(last)
    lengths = np.array([sum(map(len, text)) + marks for text in parts], dtype=np.int64)
    arrays = [array for text in parts for array in (first, *text, last) if len(array)]
    ids = np.concatenate(arrays, dtype=dtype, casting="unsafe") if arrays else np.zeros(0, dtype=dtype)
    return Encoded(ids, lengths, lost or {})
