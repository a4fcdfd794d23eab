"""Count how often the data of a stage has each token id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from titan_cpt.data.packing.packed_tokens import PackedTokens
from titan_cpt.data.training_sources import TrainingSource

MOST_COUNTED_TOKENS = 1 << 26  # seconds; beyond, an even sample of as many
_TOKENS_AT_ONCE = 1 << 20


class TokenUses(NamedTuple):
    """How often each id occurs.

    Attributes:
        counts: int64 [ids].
        counted: number of tokens that were counted.
        tokens: number of tokens in all windows of the sources that were counted.
        remote: sources in object storage, which are not counted.
    """

    counts: NDArray[np.int64]
    counted: int
    tokens: int
    remote: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether an id with the count 0 occurs nowhere."""
        return self.counted == self.tokens and not self.remote

    def __str__(self) -> str:
        """What was counted."""
        every = self.counted == self.tokens
        what = (
            f"all {self.tokens:,} tokens" if every else f"an even sample of {self.counted:,} of {self.tokens:,} tokens"
        )
        return what + (f", without {', '.join(self.remote)} in object storage" if self.remote else "")


def count_token_uses(
    sources: Mapping[str, tuple[TrainingSource, int]], ids: int, *, most_tokens: int = MOST_COUNTED_TOKENS
) -> TokenUses:
    """Count the input tokens in the windows of some sources, however many of these a stage trains on.

    Args:
        sources: name -> source, and the length at which its windows are read.
        ids: larger than every id.
        most_tokens: number of tokens to count in all; a source with more than its share is sampled at even distances.

    Raises:
        DataError: a file changed since it was opened, or contains an id outside the vocabulary.
    """
    local = {name: each for name, each in sources.items() if not each[0].is_remote}
    counts = np.zeros(ids, np.int64)
    counted = tokens = 0
    for source, seq_len in local.values():
        windows = source.windows(seq_len)
        chosen = min(windows, max(1, most_tokens // len(local) // seq_len))
        numbers = [number * windows // chosen for number in range(chosen)]
        at_once = max(1, _TOKENS_AT_ONCE // seq_len)
        for first in range(0, chosen, at_once):
            inputs = [_inputs(source, number, seq_len) for number in numbers[first : first + at_once]]
            counts += np.bincount(np.concatenate(inputs), minlength=ids)
        counted += chosen * seq_len
        tokens += windows * seq_len
    return TokenUses(counts, counted, tokens, tuple(name for name in sources if name not in local))


def _inputs(source: TrainingSource, number: int, seq_len: int) -> NDArray[np.int64]:
    """The tokens of a window except the last; of a packed sequence with the end-of-document ids that fill it."""
    if isinstance(source, PackedTokens):
        return source.row(number, seq_len).tokens[:-1]
    return source.window(number, seq_len)[:-1]
