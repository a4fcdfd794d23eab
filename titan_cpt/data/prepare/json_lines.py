"""Parse JSON lines: orjson reads almost every line; `json` reads what orjson refuses, and words every message.

orjson accepts no line that `json` refuses, with one exception: values nested deeper than Python's recursion limit. It
refuses NaN, infinite numbers, halves of surrogate pairs and a byte order mark, which `json` accepts.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import orjson

from titan_cpt.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LONG_LINE_BYTES = 2**23  # the text of a longer line is decoded piece by piece
PIECE_BYTES = 2**20
_ESCAPE_BYTES = 6  # of \uXXXX
_FIRST_HALF = re.compile(rb"\\u[dD][89abAB]..")  # of a surrogate pair
_RUN_BYTES = 64
CHOOSE_FIELD = "--text-field NAME (in a config: source.text_field)"


def field_of_lines(content: bytes, name: str, place: Callable[[int], str]) -> Iterator[tuple[int, Any]]:
    """Yield the position, from 0, of each line that is not blank, and the value of its field, whatever its type.

    Args:
        content: JSON lines.
        name: the field.
        place: returns file and line of a position; called only for a message, since it may have to count lines.

    Raises:
        DataError: a line is not a JSON object or lacks the field.
    """
    view = memoryview(content)  # a slice of it is no copy, which matters for a document of many megabytes
    position = start = 0
    while start < len(content):
        end = content.find(b"\n", start)
        end = len(content) if end < 0 else end
        value: Any = None
        if end - start > LONG_LINE_BYTES:
            value = long_text(content, start, end, name)
        if value is None:
            try:
                value = orjson.loads(view[start:end])[name]
            except (ValueError, KeyError, TypeError):
                value = None
        if isinstance(value, str | LongText):
            yield position, value
        elif (line := content[start:end]).strip():
            at = partial(place, position)
            yield position, record_field(parsed(line, at), name, at)
        position, start = position + 1, end + 1


class LongText:
    """A text of many megabytes, as the JSON string that it is in its line.

    As a str it would take up to four bytes per character, beside the line and the parser's copy of it.
    """

    def __init__(self, encoded: memoryview) -> None:
        """Take the JSON string without its quotation marks. Its pieces must be valid; see `long_text`."""
        self._encoded = encoded

    def pieces(self) -> Iterator[str]:
        """Yield the text in pieces.

        Raises:
            ValueError: a piece is not valid JSON.
        """
        start = 0
        while start < len(self._encoded):
            end = self._cut(start, start + PIECE_BYTES)
            yield orjson.loads(b"".join((b'"', self._encoded[start:end], b'"')))
            start = end

    def _cut(self, start: int, position: int) -> int:
        """Return the first position from here on at which no character of UTF-8, escape or surrogate pair continues.

        Args:
            start: a position before this one, at which none of them continues either.
            position: where to begin.
        """
        encoded = self._encoded
        while position < len(encoded) and encoded[position] & 0xC0 == 0x80:
            position += 1
        before = max(start, position - _ESCAPE_BYTES)
        escape = before + bytes(encoded[before:position]).rfind(b"\\")
        if escape >= before and not _is_escaped(encoded, start, escape):
            length = _ESCAPE_BYTES if bytes(encoded[escape + 1 : escape + 2]) == b"u" else 2
            position = max(position, escape + length)
            if _FIRST_HALF.fullmatch(encoded, escape, position) and bytes(encoded[position : position + 2]) == b"\\u":
                position += _ESCAPE_BYTES
        return min(position, len(encoded))


def long_text(content: bytes, start: int, end: int, name: str) -> LongText | None:
    """Return the field of a long line as a LongText; None if it is short, or the line has to be parsed as a whole.

    The longest string of the line is replaced by a random one, and the rest is parsed. If the field is then the random
    string, it is the longest string, and every other part of the line is valid.
    """
    first, last = _longest_string(content, start, end)
    if last - first < LONG_LINE_BYTES // 2:
        return None
    mark = secrets.token_hex(16)
    text = LongText(memoryview(content)[first:last])
    try:
        record = orjson.loads(content[start:first] + mark.encode() + content[last:end])
        if record[name] != mark:
            return None
        for _ in text.pieces():
            pass
    except (ValueError, KeyError, TypeError):
        return None
    return text


def _longest_string(content: bytes, start: int, end: int) -> tuple[int, int]:
    """Return begin and end of the longest JSON string of a line, without quotation marks."""
    longest = (start, start)
    while (first := content.find(b'"', start, end) + 1) > 0:
        last = content.find(b'"', first, end)
        while last > 0 and _is_escaped(content, first, last):
            last = content.find(b'"', last + 1, end)
        if last < 0:
            break
        longest = max(longest, (first, last), key=lambda found: found[1] - found[0])
        start = last + 1
    return longest


def _is_escaped(content: bytes | memoryview, start: int, position: int) -> bool:
    """Whether an odd number of backslashes stands before a position; at `start`, no escape continues."""
    length = _RUN_BYTES
    while True:
        before = bytes(content[max(start, position - length) : position])
        backslashes = len(before) - len(before.rstrip(b"\\"))
        if backslashes < len(before) or position - length <= start:
            return backslashes % 2 == 1
        length *= _RUN_BYTES


def parsed(content: bytes, place: Callable[[], str]) -> Any:
    """Return the JSON value of a line or a file.

    Raises:
        DataError: it is not JSON, or not UTF-8; the message begins with `place()`.
    """
    content = content.removeprefix(BYTE_ORDER_MARK)
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError as fault:
        raise DataError(f"{place()}: byte {content[fault.start]:#04x} is not UTF-8; convert the file") from None
    except (ValueError, RecursionError) as fault:
        raise DataError(
            f"{place()}: is not JSON ({fault}); begins with {short(content[:60])}; allowed is one object per line, or "
            "in a .json file one array of objects"
        ) from None


def record_field(record: Any, name: str, place: Callable[[], str]) -> Any:
    """Return a field of a JSON object.

    Raises:
        DataError: it is not an object, or lacks the field; the message begins with `place()`.
    """
    if not isinstance(record, dict):
        raise DataError(f"{place()}: is {short(record)}; allowed is an object with the field {name!r}")
    if name not in record:
        fields = ", ".join(record) or "none"
        raise DataError(f"{place()}: no field {name!r}; its fields are {fields}: choose one with {CHOOSE_FIELD}")
    return record[name]


def short(value: Any) -> str:
    """Return a value as Python writes it, cut after 60 characters."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
