"""Fertility: how many tokens a tokenizer needs for a text. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from titan_cpt.data.tokenizer.tokenizer import Tokenizer

_BATCH = 1000  # documents


@dataclass(frozen=True)
class Fertility:
    """Counts of a text.

    Attributes:
        words: parts between white space.
        bytes: of the text in UTF-8.
        tokens: ids, without begin- and end-of-document tokens.
        new_tokens: how many of them are ids from `first_new` on.
        distinct_new: how many such ids occur.
    """

    words: int
    bytes: int
    tokens: int
    new_tokens: int = 0
    distinct_new: int = 0

    @property
    def tokens_per_word(self) -> float:
        """Fertility in the narrow sense; NaN without words."""
        return self.tokens / self.words if self.words else float("nan")

    @property
    def bytes_per_token(self) -> float:
        """Compression; NaN without tokens."""
        return self.bytes / self.tokens if self.tokens else float("nan")

    def as_json(self) -> dict[str, Any]:
        """Counts and ratios; a ratio without a denominator is None."""
        ratios = {"tokens_per_word": self.tokens_per_word, "bytes_per_token": self.bytes_per_token}
        return {**asdict(self), **{name: None if value != value else value for name, value in ratios.items()}}


def fertility(tokenizer: Tokenizer, texts: Iterable[str], *, first_new: int | None = None) -> Fertility:
    """Count words, bytes and tokens of texts.

    Args:
        tokenizer: encodes the texts.
        texts: documents.
        first_new: first id that the tokenizer has beyond the one that it extends; None: it extends none.

    Raises:
        DataError: see `Tokenizer.encode`.
    """
    words = size = 0
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for batch in _batches(texts):
        for text in batch:
            words += len(text.split())
            size += len(text.encode())
        for ids in tokenizer.encode_batch(batch):
            counts += np.bincount(ids, minlength=tokenizer.vocab_size)
    new = counts[tokenizer.vocab_size if first_new is None else first_new :]
    return Fertility(words, size, int(counts.sum()), int(new.sum()), int((new > 0).sum()))


def _batches(texts: Iterable[str]) -> Iterable[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
