"""Dataset formats that other packages register: a function that opens token files, and the reader that it returns.

docs/library.md has an example. The reader is wrapped, so that each format has the same checks and the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from titan_cpt.common.plugins import FORMATS, Plugin, find_plugin
from titan_cpt.errors import DataError, TitanError


class TokenReader(Protocol):
    """What the function of a format returns. Must work after pickling and forking: data-loader workers receive it.

    A reader whose sequences are cut already also has `windows(seq_len) -> int`, their number, and
    `window(number, seq_len)`, which returns the seq_len + 1 tokens of one. Without these two, window k is tokens
    [k seq_len, (k + 1) seq_len], as in Megatron.
    """

    tokens: int
    """Number of tokens."""

    def read(self, start: int, count: int) -> npt.ArrayLike:
        """Return tokens [start, start + count), integers."""

    def fingerprint(self) -> str:
        """Return a digest of the content that is the same on every machine; a run resumes only if it is unchanged."""


OpenTokens = Callable[..., TokenReader]
"""`open_tokens(entries, **format_options)`: called with the strings of the config's `train` or `validation`, without
expanding globs. FileNotFoundError means that the data does not exist yet, ValueError or OSError that it is damaged."""


def open_registered(format_name: str, entries: Sequence[str], options: Mapping[str, Any]) -> TokenReader | None:
    """Open the token files of a registered format; None if they do not exist yet.

    Raises:
        ConfigError: the plugin is missing or cannot be loaded.
        DataError: the plugin raised an error, or returned an object without the methods of `TokenReader`.
    """
    plugin = find_plugin(FORMATS, format_name)
    open_tokens: OpenTokens = plugin.load()
    try:
        reader = open_tokens(tuple(entries), **options)
    except FileNotFoundError:
        return None
    except TitanError:
        raise
    except Exception as error:
        raise _failed(plugin, entries, error) from error
    lacking = [name for name in ("tokens", "read", "fingerprint") if not hasattr(reader, name)]
    if hasattr(reader, "windows") != hasattr(reader, "window"):
        lacking.append("window" if hasattr(reader, "windows") else "windows")
    if lacking:
        raise DataError(
            f"{', '.join(entries)}: format {format_name!r} of {plugin.origin} returned a {type(reader).__name__} "
            f"without {', '.join(lacking)}: correct {plugin.package} (docs/library.md)"
        )
    return reader


class RegisteredTokens:
    """A TokenSource over a registered format's reader: windows, order, and the check of every id.

    Attributes:
        tokens: number of tokens.
        in_stored_order: each epoch reads the windows in stored order, not permuted.
        is_remote: False; a reader of remote files caches them itself.
    """

    is_remote = False

    def __init__(
        self,
        format_name: str,
        entries: Sequence[str],
        options: Mapping[str, Any],
        *,
        vocab_size: int,
        in_stored_order: bool,
    ) -> None:
        """Open the files; every read compares its ids with the vocabulary.

        Raises:
            ConfigError: see open_registered.
            DataError: the files are missing or damaged.
        """
        reader = open_registered(format_name, entries, options)
        if reader is None:
            raise DataError(f"{', '.join(entries)}: not found by format {format_name!r}")
        self._reader = reader
        self._format = format_name
        self._entries = tuple(entries)
        self._vocab_size = vocab_size
        self.tokens = int(reader.tokens)
        self.in_stored_order = in_stored_order

    def windows(self, seq_len: int) -> int:
        """Return the number of windows.

        Raises:
            DataError: the plugin raised an error.
        """
        return count_windows(self._reader, seq_len)

    def window(self, number: int, seq_len: int) -> npt.NDArray[np.int64]:
        """Return the seq_len + 1 tokens of a window, int64.

        Raises:
            DataError: the plugin raised an error or returned something else, or an id is not in the vocabulary.
        """
        own = getattr(self._reader, "window", None)
        try:
            found = own(number, seq_len) if own else self._reader.read(number * seq_len, seq_len + 1)
            window = np.asarray(found)
        except TitanError:
            raise
        except Exception as error:
            raise _failed(find_plugin(FORMATS, self._format), self._entries, error) from error
        where = f"{', '.join(self._entries)}: window {number} in format {self._format!r}"
        if window.shape != (seq_len + 1,) or window.dtype.kind not in "iu":
            raise DataError(
                f"{where} is {window.dtype} of shape {window.shape}; allowed are {seq_len + 1} integers: correct "
                f"{find_plugin(FORMATS, self._format).package}"
            )
        if int(window.max()) >= self._vocab_size or int(window.min()) < 0:
            wrong = int(window[(window >= self._vocab_size) | (window < 0)][0])
            raise DataError(
                f"{where} has id {wrong}; allowed are ids from 0 to {self._vocab_size - 1}, the tokenizer's "
                "vocabulary. Was this data made with another tokenizer?"
            )
        return window.astype(np.int64)

    def fetch(self, _numbers: Sequence[int], _seq_len: int) -> None:
        """Nothing to do: see is_remote."""

    def fingerprint(self) -> str:
        """Return a digest of the reader's own, of the format's name and of how windows are cut."""
        own_windows = hasattr(self._reader, "window")
        return hashlib.sha256(f"{self._format} {own_windows} {self._reader.fingerprint()}".encode()).hexdigest()


def count_windows(reader: TokenReader, seq_len: int) -> int:
    """The number of windows: the reader's own, or as many as a stream of tokens has."""
    own = getattr(reader, "windows", None)
    return int(own(seq_len)) if own else max(0, int(reader.tokens) - 1) // seq_len


def _failed(plugin: Plugin, entries: Sequence[str], error: Exception) -> DataError:
    return DataError(
        f"{', '.join(entries)}: format {plugin.entry.name!r} of {plugin.origin} failed: {type(error).__name__}: {error}"
    )
