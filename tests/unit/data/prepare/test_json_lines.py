"""JSON lines: the fast parser gives the values and the messages of Python's `json`, line by line."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from titan_cpt.data.prepare import json_lines
from titan_cpt.data.prepare.json_lines import LongText, field_of_lines, parsed, record_field
from titan_cpt.errors import DataError


def place(position: int) -> str:
    return f"x.jsonl:{position + 1}"


def fast(content: bytes) -> list[tuple[int, object]] | str:
    """The values by position, or the message."""
    try:
        return [*field_of_lines(content, "text", place)]
    except DataError as fault:
        return str(fault)


def slow(content: bytes) -> list[tuple[int, object]] | str:
    """The same with `json` only."""
    try:
        return [
            (position, record_field(parsed(line, lambda position=position: place(position)), "text",
                                    lambda position=position: place(position)))
            for position, line in enumerate(content.split(b"\n"))
            if line.strip()
        ]  # fmt: skip
    except DataError as fault:
        return str(fault)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
records = st.dictionaries(st.sampled_from(["text", "id", "\u00e4"]), values | st.text(), max_size=3) | values
whole = st.builds(
    lambda record, ascii_only: json.dumps(record, ensure_ascii=ascii_only).encode(errors="surrogatepass"),
    records,
    st.booleans(),
)
damaged = st.builds(
    lambda line, at, more: line[: at % (len(line) + 1)] + more + line[at % (len(line) + 1) :],
    whole,
    st.integers(0, 200),
    st.binary(max_size=3).map(lambda more: more.replace(b"\n", b" ")),
)


@settings(max_examples=600, deadline=None)
@given(st.lists(whole | damaged, max_size=5).map(b"\n".join))
@example(b'{"text": "a", "id": NaN}\n{"text": "b", "id": -Infinity, "text": "c"}')
@example(b'{"text": "a\\ud800b"}\n{"text": "a", "id": "\\udfff"}')
@example(b'{"text": "\xed\xa0\x80"}')
@example(b'{"text": "a", "id": "\xff"}')
@example(b'{"text": "a", "id": "\xc0\x80"}')
@example(b'\xef\xbb\xbf{"text": "a"}\n \x0b\x0c\n\t{"text": "b"} \r\n\n')
@example(b'{"text": "a", "id": ' + b"9" * 5000 + b"}")
@example(b'{"text": 123456789012345678901234567890}')
@example(b'{"text": "a", "id": 1e999}')
@example(b'{"text": "a", "id": 01}')
@example(b'{"text": "a\tb"}')
@example(b'{"text": "a",}')
@example(b'{"text": "a"} {"text": "b"}')
@example(b'["text"]')
@example(b'"text"')
@example(b"7\n")
@example(b'{"text": null}\n{"txt": 1}')
def test_every_line_gives_the_value_or_the_message_of_json(content):
    """Whole and damaged lines, of every type, with what orjson refuses and `json` accepts."""
    assert repr(fast(content)) == repr(slow(content))


def test_a_line_nested_deeper_than_pythons_limit_is_the_only_one_that_only_orjson_reads():
    """Up to 1,024 levels; the text beside the nested value is a text like others."""
    line = b'{"text": "a", "id": ' + b"[" * 1000 + b"]" * 1000 + b"}"

    assert fast(line) == [(0, "a")]
    with pytest.raises(DataError, match=r"x\.jsonl:1: is not JSON"):
        next(field_of_lines(line.replace(b"[" * 1000, b"[" * 9000).replace(b"]" * 1000, b"]" * 9000), "text", place))


def test_lines_are_counted_for_messages_only():
    """To know the number of a line, the file before it has to be read again."""
    asked: list[int] = []

    def counting(position: int) -> str:
        asked.append(position)
        return place(position)

    content = b'{"text": "a"}\n{"text": "b", "id": NaN}\n\n{"text": 5}\n{"txt": "c"}\n'
    lines = field_of_lines(content, "text", counting)
    assert [next(lines) for _ in range(3)] == [(0, "a"), (1, "b"), (3, 5)]
    assert asked == []
    with pytest.raises(DataError, match=r"x\.jsonl:5: no field 'text'; its fields are txt"):
        next(lines)

    assert asked == [4]


long_texts = st.lists(
    st.text(max_size=30) | st.sampled_from(["\\", '"', "\n", "\U0001f600", "a" * 50, "\u4e2d"]), max_size=40
)


@settings(max_examples=300, deadline=None)
@given(
    text=long_texts.map("".join),
    others=st.dictionaries(st.sampled_from(["id", "a\\", 'b"']), st.text(max_size=9) | st.integers(), max_size=3),
    ascii_only=st.booleans(),
    piece_bytes=st.integers(13, 60),
    break_at=st.none() | st.integers(0, 2000),
)
def test_a_long_text_in_pieces_is_the_text(text, others, ascii_only, piece_bytes, break_at):
    """Whatever characters and escapes are at the cuts; a damaged line has the message of `json`."""
    line = json.dumps({"id": 1, "text": text, **others}, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    if break_at is not None:
        at = break_at % len(line)
        line = line[:at] + b"\x01" + line[at + 1 :]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "LONG_LINE_BYTES", 20)
        patch.setattr(json_lines, "PIECE_BYTES", piece_bytes)
        found = fast(line + b"\n")
        if isinstance(found, list) and isinstance(found[0][1], LongText):
            found = [(0, "".join(found[0][1].pieces()))]

    assert repr(found) == repr(slow(line))


def test_the_last_of_two_fields_of_a_name_is_the_text_also_in_a_long_line(monkeypatch):
    """As in `json`; and a long string elsewhere in the line is not the text."""
    monkeypatch.setattr(json_lines, "LONG_LINE_BYTES", 20)
    long = "x" * 100
    for line, expected in (
        ({"text": "short", "other": long}, "short"),
        ({"text": "short", "other": {"text": long}}, "short"),
        ({long: "y", "text": "short"}, "short"),
    ):
        assert fast(json.dumps(line).encode()) == [(0, expected)]
    assert fast(f'{{"text": "{long}", "text": "b"}}'.encode()) == [(0, "b")]
    ((_, text),) = fast(f'{{"text": "b", "text": "{long}"}}'.encode())

    assert "".join(text.pieces()) == long


def test_no_cut_parts_the_two_escapes_of_a_character(monkeypatch):
    """A text with such a cut would be decoded as a whole, which takes several times the memory."""
    monkeypatch.setattr(json_lines, "LONG_LINE_BYTES", 20)
    for piece_bytes in range(13, 60):
        monkeypatch.setattr(json_lines, "PIECE_BYTES", piece_bytes)
        text = "a" * 30 + "\U0001f600" + "b" * 60
        ((_, found),) = fast(json.dumps({"text": text}).encode())
        assert isinstance(found, LongText), piece_bytes
        assert "".join(found.pieces()) == text


@pytest.mark.parametrize("unit", ["\n", "\\", '"', "\u0436", "\U0001f600", "\\\u0436\n"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_long_text_of_only_escapes_is_cut_into_pieces_of_one_size(monkeypatch, unit, ascii_only):
    """Line ends, backslashes, and each script except Latin in the form that `json` writes by default."""
    monkeypatch.setattr(json_lines, "PIECE_BYTES", 1000)
    encoded = json.dumps(unit * 3000, ensure_ascii=ascii_only).encode()[1:-1]
    text = LongText(memoryview(encoded))
    parts = [*text.pieces()]

    assert "".join(parts) == unit * 3000
    assert max(len(json.dumps(part, ensure_ascii=ascii_only).encode()) for part in parts) <= 1000 + 2 + 12
