"""Texts of single tokens, for messages: quoted, on one line, whatever characters they have. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence

from titan_cpt.data.tokenizer.tokenizer import load_tokenizer

_LONGEST = 40  # characters of a text, with its quotes


class TokenTexts:
    """The texts of a tokenizer's ids."""

    def __init__(self, path: str) -> None:
        """Open a tokenizer.

        Args:
            path: "bytes", a tokenizer.json, or the folder of one.

        Raises:
            DataError: see `load_tokenizer`.
        """
        self._bytes: Sequence[bytes] = load_tokenizer(path).token_bytes_by_id()

    @property
    def ids(self) -> list[int]:
        """The ids that a token has, ascending."""
        return [number for number, content in enumerate(self._bytes) if content]

    def quoted(self, number: int) -> str:
        """The text of an id as a Python literal, cut if it is long; "no token" for an id that no token has.

        Control characters, line separators and marks of writing direction are escaped; incomplete UTF-8 is shown as
        bytes.
        """
        content = self._bytes[number] if number < len(self._bytes) else b""
        if not content:
            return "no token"
        try:
            shown = repr(content.decode())
        except UnicodeDecodeError:
            shown = repr(content)
        return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 3]}..."
