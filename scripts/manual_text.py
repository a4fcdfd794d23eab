"""Extract clean paragraphs from the markup of manuals: one language, no text that two documents share.

scripts/fetch_quickstart.py uses it, and describes where the pages come from.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import ClassVar, NamedTuple
from xml.etree import ElementTree

BODY = 99
"""Level of a line that is not a heading: below every heading."""

NGRAM_WORDS = 10
"""Two documents that share this many consecutive words contain the same text."""
SHORT_LINE_WORDS = 4
"""Lines with fewer words ("See also") are too common to show a copy, and may repeat."""
MIN_DOCUMENT_WORDS = 30
"""A document must have this many words after cleaning."""


class Line(NamedTuple):
    """A paragraph, a list item or a heading."""

    text: str
    level: int
    """1 for the topmost heading, increasing downwards; BODY for other lines."""


@dataclass(frozen=True)
class Page:
    """One document."""

    id: str
    source: str
    lines: list[Line]


@dataclass(frozen=True)
class Dropped:
    """UTF-8 bytes that cleaning read and removed."""

    read_bytes: int
    other_language_bytes: int
    repeated_bytes: int
    fragment_bytes: int


def _words(listing: str) -> frozenset[str]:
    return frozenset(listing.split())


# Frequent words of each language that the other does not have ("in", "an", "was", "die", "so" are words of both).
STOP_WORDS = {
    "english": _words("""
        the of and to is for that with as are be this or by from it you can not on which if your use when have has
        """),
    "german": _words("""
        der und das den dem des ein eine einen einer eines ist sind nicht sie mit auf von zu im werden wird oder für
        wenn auch als bei aus nach durch diese dieser zum zur kann können ihre
        """),
}
MIN_STOP_WORD_FRAC = 0.04
"""Fraction of stop words. Running text has 0.2 to 0.5, tables of names have almost none."""
MIN_JUDGED_WORDS = 8
"""The language of a shorter line cannot be determined."""


def html_lines(markup: str) -> list[Line]:
    """Return the paragraphs, headings and list items of an HTML page without navigation and code."""
    reader = _HtmlReader()
    reader.feed(markup)
    reader.close()
    reader.flush()
    return reader.lines


class _HtmlReader(HTMLParser):
    """Collects running text in `lines`."""

    HEADINGS: ClassVar = {"h1": 1, "h2": 2, "h3": 3, "h4": 4, "h5": 5, "h6": 6, "dt": 7}
    BLOCKS = _words("""
        p div li ul ol dl dt dd h1 h2 h3 h4 h5 h6 table tr td th caption blockquote section article br hr pre
        """)
    VOID = _words("area base br col embed hr img input link meta source track wbr")
    # Code, media and the navigation around a page.
    SKIPPED_TAGS = _words("head header footer nav aside script style noscript button select pre svg math")
    SKIPPED_CLASSES = _words("""
        navheader navfooter toc related relatedtopics howtoget sphinxsidebar headerlink footer copyright legalnotice
        authorgroup indexterm MAC UNIX WIN
        """)
    # LibreOffice writes alternatives for its programs inside one of these; a reader sees only one.
    SWITCH_CLASSES = _words("switch switchinline")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.lines: list[Line] = []
        self._pieces: list[str] = []
        self._level = BODY
        self._skipped_tag = ""
        self._skipped_depth = 0
        self._open: list[list[bool]] = []  # for each open span and div: is it a switch, was an alternative read

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin a line, or begin to skip an element."""
        if self._skipped_depth:
            self._skipped_depth += tag == self._skipped_tag
            return
        classes = set((dict(attrs).get("class") or "").split())
        if tag in self.BLOCKS:
            self.flush()
            self._level = self.HEADINGS.get(tag, BODY)
        if tag in self.SKIPPED_TAGS or classes & self.SKIPPED_CLASSES or self._is_second_alternative(tag):
            if tag not in self.VOID:
                self._skipped_tag, self._skipped_depth = tag, 1
        elif tag in ("span", "div"):
            self._open.append([bool(classes & self.SWITCH_CLASSES), False])

    def _is_second_alternative(self, tag: str) -> bool:
        """Whether an earlier child of the switch was read already."""
        if tag not in ("span", "div") or not self._open or not self._open[-1][0]:
            return False
        seen, self._open[-1][1] = self._open[-1][1], True
        return seen

    def handle_endtag(self, tag: str) -> None:
        """End a line or a skipped element."""
        if self._skipped_depth:
            self._skipped_depth -= tag == self._skipped_tag
            return
        if tag in self.BLOCKS:
            self.flush()
        if tag in ("span", "div") and self._open:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        """Append text to the current line."""
        if not self._skipped_depth:
            self._pieces.append(data)

    def flush(self) -> None:
        """End the current line, and append it if it is running text."""
        _append(self.lines, "".join(self._pieces), self._level)
        self._pieces.clear()
        self._level = BODY


def mallard_lines(markup: str, titles: dict[str, str] | None = None) -> list[Line]:
    """Return the paragraphs and titles of a page of GNOME's help (Mallard XML).

    Args:
        markup: the page.
        titles: link target -> title, for links without a text of their own (see `mallard_titles`).
    """
    lines: list[Line] = []
    _collect_mallard(ElementTree.fromstring(markup), titles or {}, lines, depth=1)
    return lines


def _collect_mallard(element: ElementTree.Element, titles: dict[str, str], lines: list[Line], *, depth: int) -> None:
    for child in element:
        tag = _local_name(child)
        if tag in ("p", "title"):
            _append(lines, _mallard_inline(child, titles), depth if tag == "title" else BODY)
        elif tag not in _MALLARD_SKIPPED:
            _collect_mallard(child, titles, lines, depth=depth + 1)


_MALLARD_SKIPPED = _words("info comment code screen media links when")  # `when` is the wording for another desktop


def _mallard_inline(element: ElementTree.Element, titles: dict[str, str]) -> str:
    if _local_name(element) == "keyseq":  # keys pressed together
        return "+".join(_mallard_inline(key, titles).strip() for key in element)
    pieces = [element.text or ""]
    for child in element:
        inner = _mallard_inline(child, titles)
        if _local_name(child) == "link" and not inner.strip():
            inner = titles.get(child.get("xref", ""), "")
        pieces += [inner, child.tail or ""]
    return "".join(pieces)


def mallard_titles(pages: Iterable[str]) -> dict[str, str]:
    """Return the titles of all pages ("page") and sections ("page#section") by link target."""
    titles = {}
    for markup in pages:
        page = ElementTree.fromstring(markup)
        for element in page.iter():
            title = next((child for child in element if _local_name(child) == "title"), None)
            if title is not None and (element is page or element.get("id")):
                target = page.get("id", "") + ("" if element is page else f"#{element.get('id')}")
                titles[target] = tidy(_mallard_inline(title, {}))
    return titles


def _local_name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def _append(lines: list[Line], text: str, level: int) -> None:
    """Append `text` as a line if it is running text and differs from the previous line."""
    line = Line(tidy(text), level)
    if is_prose(line) and not (lines and lines[-1].text == line.text):
        lines.append(line)


def tidy(text: str) -> str:
    """Return `text` in NFC on one line, without invisible characters and doubled spaces."""
    text = _INVISIBLE.sub("", unicodedata.normalize("NFC", text))
    return _SPACE_BEFORE_MARK.sub(r"\1", " ".join(text.split()))


_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
_SPACE_BEFORE_MARK = re.compile(r"\s+([,.;:!?])(?=\s|$)")


def is_prose(line: Line) -> bool:
    """Whether a line is running text: mostly letters, and, unless a heading, longer than a table cell."""
    letters = sum(map(str.isalpha, line.text))
    if not letters or letters < 0.7 * (len(line.text) - line.text.count(" ")):
        return False
    return line.level < BODY or len(words_of(line.text)) >= SHORT_LINE_WORDS


def words_of(text: str) -> list[str]:
    """Return the words of `text` in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def language_of(text: str) -> str | None:
    """Return the language with the most stop words in `text`, or None if there are too few."""
    words = words_of(text)
    counts = {language: sum(word in stop_words for word in words) for language, stop_words in STOP_WORDS.items()}
    best = max(counts, key=lambda language: counts[language])
    others = sum(counts.values()) - counts[best]
    if counts[best] <= others or counts[best] < MIN_STOP_WORD_FRAC * len(words):
        return None
    return best


def in_language(lines: list[Line], language: str) -> list[Line]:
    """Return the lines that are not in another language; none if the text as a whole is not in `language`."""
    if language_of(joined(lines)) != language:
        return []
    return [
        line
        for line in lines
        if len(words_of(line.text)) < MIN_JUDGED_WORDS or language_of(line.text) in (language, None)
    ]


def joined(lines: Iterable[Line]) -> str:
    """Return the text of the lines, one per line."""
    return "\n".join(line.text for line in lines)


def repeat_keys(line: str) -> list[str]:
    """Return the keys that no other document may share with this line: its 10-grams, or a shorter line as a whole.

    A line of fewer than SHORT_LINE_WORDS words has no key: it may repeat.
    """
    words = words_of(line)
    if len(words) < SHORT_LINE_WORDS:
        return []
    return [" ".join(words[i : i + NGRAM_WORDS]) for i in range(max(1, len(words) - NGRAM_WORDS + 1))]


def drop_repeats(texts: Iterable[list[Line]]) -> Iterator[list[Line]]:
    """Yield each text without the lines that repeat an earlier text.

    Afterwards no line of one text shares NGRAM_WORDS consecutive words with a line of another text.
    """
    seen: set[str] = set()
    for lines in texts:
        keyed = [(line, repeat_keys(line.text)) for line in lines]
        kept = [(line, keys) for line, keys in keyed if seen.isdisjoint(keys)]
        seen.update(key for _, keys in kept for key in keys)
        yield [line for line, _ in kept]


def drop_empty_headings(lines: list[Line]) -> list[Line]:
    """Return the lines without headings whose section is empty, such as "Example:" before removed code."""
    kept: list[Line] = []
    deepest = 0  # level of the last line kept; the section of a heading is not empty if that line is deeper
    for line in reversed(lines):
        if line.level == BODY or deepest > line.level:
            kept.append(line)
            deepest = line.level
    return kept[::-1]


def clean(pages: list[Page], language: str) -> tuple[list[Page], Dropped]:
    """Return the sorted pages in `language`, without repeated text and fragments, and what was removed."""
    pages = sorted(pages, key=lambda page: (page.source, page.id))
    own = [in_language(page.lines, language) for page in pages]
    unique = list(drop_repeats(own))
    kept = []
    for page, lines in zip(pages, map(drop_empty_headings, unique), strict=True):
        if len(words_of(joined(lines))) >= MIN_DOCUMENT_WORDS:
            kept.append(Page(page.id, page.source, lines))
    read, in_own, in_unique, in_kept = (
        sum(len(joined(lines).encode()) for lines in texts)
        for texts in ([page.lines for page in pages], own, unique, [page.lines for page in kept])
    )
    return kept, Dropped(read, read - in_own, in_own - in_unique, in_unique - in_kept)


def article_lines(article: str) -> list[Line]:
    """Return the running text of a Wikipedia article, up to its references and links."""
    lines: list[Line] = []
    for raw in article.split("\n"):
        if tidy(raw) in _WIKIPEDIA_ENDS:
            break
        _append(lines, raw, BODY)
    return lines


_WIKIPEDIA_ENDS = frozenset(
    """
    See also, Notes, References, Further reading, External links, Bibliography, Sources, Citations,
    Siehe auch, Literatur, Weblinks, Einzelnachweise, Anmerkungen, Quellen, Belege, Fußnoten
    """.strip()
    .replace(",\n", ",")
    .split(", ")
)
