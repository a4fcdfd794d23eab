"""Parse JSON lines: orjson reads almost every line; `json` reads what orjson refuses, and words every message.

orjson accepts no line that `json` refuses, with one exception: values nested deeper than Python's recursion limit. It
refuses NaN, infinite numbers, halves of surrogate pairs and a byte order mark, which `json` accepts.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import orjson

from titan_cpt.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
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
        try:
            value = orjson.loads(view[start:end])[name]
        except (ValueError, KeyError, TypeError):
            value = None
        if isinstance(value, str):
            yield position, value
        elif (line := content[start:end]).strip():
            at = partial(place, position)
            yield position, record_field(parsed(line, at), name, at)
        position, start = position + 1, end + 1


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
