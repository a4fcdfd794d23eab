"""Say in a few lines which rows of a model's vocabulary weights are weak, and how often data uses their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from titan_cpt.checkpoint.vocabulary.weak_rows import NON_FINITE, WeakRows
from titan_cpt.data.token_uses import TokenUses
from titan_cpt.data.tokenizer.token_texts import TokenTexts

_NAMED = 10  # rows of each kind


def weak_row_lines(
    found: Mapping[str, WeakRows], texts: TokenTexts | None, uses: TokenUses | None = None
) -> Iterator[str]:
    """A line for each kind in each weight, which names the most used of its rows, or the first without data.

    Args:
        found: by the name of a weight.
        texts: None if the tokenizer is not known.
        uses: how often the data uses each id; None without data.
    """
    for name, weak in found.items():
        where = name.removesuffix(".weight")
        for kind, ids in weak.by_kind.items():
            yield f"{where}: {_rows(len(ids))} {kind}{_used(ids, uses)}: {_named(ids, texts, uses)}"


def counts_by_kind(found: Mapping[str, WeakRows]) -> dict[str, dict[str, int]]:
    """Weight -> kind -> number of rows, of the weights with weak rows; for logs."""
    return {
        name: {kind: len(ids) for kind, ids in weak.by_kind.items()} for name, weak in found.items() if weak.by_kind
    }


def used_rows(found: Mapping[str, WeakRows], uses: TokenUses) -> dict[str, WeakRows]:
    """The weak rows that the data uses; all, where it is in object storage and not counted."""
    used = (uses.counts > 0) | bool(uses.remote)
    return {name: weak.restricted(used) for name, weak in found.items()}


def only_non_finite(found: Mapping[str, WeakRows]) -> dict[str, WeakRows]:
    """The rows that are not finite."""
    return {
        name: WeakRows({NON_FINITE: weak.by_kind[NON_FINITE]}, weak.tokens)
        for name, weak in found.items()
        if NON_FINITE in weak.by_kind
    }


def _rows(count: int) -> str:
    return f"{count:,} row is" if count == 1 else f"{count:,} rows are"


def _used(ids: NDArray[np.int64], uses: TokenUses | None) -> str:
    return "" if uses is None else f", used {uses.counts[ids].sum():,} times"


def _named(ids: NDArray[np.int64], texts: TokenTexts | None, uses: TokenUses | None) -> str:
    if uses is not None:
        ids = ids[np.argsort(-uses.counts[ids], kind="stable")]
    words = []
    for number in ids[:_NAMED].tolist():
        text = f" {texts.quoted(number)}" if texts else ""
        words.append(f"{number}{text}" + (f" ({uses.counts[number]:,})" if uses is not None else ""))
    more = len(ids) - len(words)
    return ", ".join(words) + (f" and {more:,} more" if more else "")
