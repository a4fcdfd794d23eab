"""TokenSource: the interface through which the data loader and validation read a source, whatever its file format."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt


class TokenSource(Protocol):
    """The windows of seq_len + 1 tokens of one source. Can be pickled and forked."""

    tokens: int
    """Number of tokens."""
    in_stored_order: bool
    """Each epoch reads the windows in stored order; otherwise in a seeded permutation."""

    is_remote: bool
    """A file is in object storage: reading a window may take long, and `fetch` shortens that."""

    def windows(self, seq_len: int) -> int:
        """Return the number of windows.

        Raises:
            DataError: the files contain sequences of another length.
        """

    def window(self, number: int, seq_len: int) -> npt.NDArray[np.int64]:
        """Return the seq_len + 1 tokens of window `number`, int64.

        Raises:
            DataError: a file changed since it was opened, or an id is not in the vocabulary.
        """

    def fetch(self, numbers: Sequence[int], seq_len: int) -> None:
        """Fetch windows that will be read soon from object storage into the local cache; nothing for local files.

        Raises:
            RemoteError: a file changed since it was opened, or storage does not answer.
        """

    def fingerprint(self) -> str:
        """Return a hexadecimal digest of the content and of how it is divided into windows."""
