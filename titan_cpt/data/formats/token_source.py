"""What the loader and the validation ask of a source: how many sequences, which tokens, in whose order."""

from typing import Protocol

import numpy as np
import numpy.typing as npt


class TokenSource(Protocol):
    """Sequences of seq_len + 1 tokens. Can be pickled and forked; how they lie in files is its own matter."""

    tokens: int
    """Count."""
    in_stored_order: bool
    """Window o is what is seen o-th in each epoch; otherwise a seeded permutation decides."""

    def windows(self, seq_len: int) -> int:
        """How many sequences there are.

        Raises:
            DataError: there are none of this length.
        """

    def window(self, number: int, seq_len: int) -> npt.NDArray[np.int64]:
        """The seq_len + 1 tokens of sequence `number`.

        Raises:
            DataError: a file changed since it was opened, or an id is not in the vocabulary.
        """

    def fingerprint(self) -> str:
        """Hexadecimal identity of the content and of what cuts it into sequences."""
