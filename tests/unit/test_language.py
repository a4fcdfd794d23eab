"""The language of the package, its tests and its pages: the field's terms, none of the phrases in BANNED."""

import ast
import re
from pathlib import Path

import pytest

from unit.test_architecture import FILES, TREES

ROOT = Path(__file__).resolve().parents[2]
TESTS = {str(path.relative_to(ROOT)): path for path in sorted(ROOT.glob("tests/**/*.py"))}
del TESTS["tests/unit/test_language.py"]  # it has to name the banned phrases
PAGES = {str(page.relative_to(ROOT)): page for page in [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]}

BANNED = {  # what is never written: what is written instead
    r"told|tells? of": "logged, printed, passed, given",
    r"asked|asks for": "requested, configured",
    r"kept[ -]out|left[ -]out": "excluded, omitted",
    r"held[ -]out": "validation",
    r"held against|holds? .{0,30} against": "compared with",
    r"go(es)? on": "resumes, continues",
    r"so many": "N, the number itself",
    r"pass(ed|es)? over": "skipped",
    r"(can|could)(not| not)? be had|is had": "(not) available",
    r"lies?": "is stored, is",
    r"alone": "only, by itself",
    r"arms?": "sweep run",
    r"left behind|lived through": "forgotten, training history",
    r"comes? to": "is, gives",
    r"whoever": "the caller, the user",
    r"is said": "(an actor who says it)",
}
PUBLIC = ("--arm", "arm.toml", "arm-", "alone-")  # flags and file names that users have, and that keep their spelling
BANNED_IN_NAMES = {"told", "asked", "arm", "arms", "parallelise", "materialise", "summarise", "initialise"}
PATTERN = re.compile(r"\b(" + "|".join(BANNED) + r")\b", re.IGNORECASE)


def banned(lines):
    """`line: phrase` for every banned phrase in (line, text) pairs, also where a phrase continues on the next line."""
    starts, text = [], ""
    for number, words in lines:
        starts.append((len(text), number))
        text += " ".join(words.split()) + " "
    return [
        f"{max((start, line) for start, line in starts if start <= match.start())[1]}: {match[0]!r}"
        for match in PATTERN.finditer(without_public_names(text))
    ]


def comments(path):
    """(line, text) of every line of a file: its comment, or nothing."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        yield number, line.partition("#")[2]


def texts(tree):
    """(line, text) of every string and the parts of f-strings: docstrings, messages, help texts, keys."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def claims(tree):
    """(line, text) of every docstring and of every test's name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield getattr(node, "lineno", 1), ast.get_docstring(node) or ""
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.lineno, node.name.replace("_", " ")


def prose(page):
    """(line, text) of a Markdown page's prose: no code blocks, no `code`, no addresses of links."""
    fenced = indented = False
    before = ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        deep = re.match(r" {4,}(?![-*] |[0-9]+[.] )", line) is not None
        indented = deep and (indented or not before.strip())
        before = line
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not indented:
            yield number, re.sub(r"`[^`]*`|\]\([^)]*\)", "", line)


def names(tree):
    """(line, name) of every definition, parameter, field, variable and attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def words_of(name):
    """The words of an identifier in snake_case or CamelCase."""
    return {word.lower() for part in name.split("_") for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", part)}


def without_public_names(text):
    """The text without the names in PUBLIC."""
    return re.sub("|".join(map(re.escape, PUBLIC)), lambda name: "_" * len(name[0]), text)


@pytest.mark.parametrize("name", FILES)
def test_texts_are_in_the_language_of_the_field(name):
    """Docstrings, messages, help texts and comments; BANNED says what to write instead."""
    found = [*(one for text in texts(TREES[name]) for one in banned([text])), *banned(comments(FILES[name]))]

    assert found == []


@pytest.mark.parametrize("name", FILES)
def test_identifiers_are_spelt_as_in_torch_and_say_what_they_are(name):
    """No told, no asked, no arm; American spelling, as `parallelize_module` has it."""
    found = [f"{line}: {one}" for line, one in names(TREES[name]) if words_of(one) & BANNED_IN_NAMES]

    assert found == []


@pytest.mark.parametrize("name", TESTS)
def test_names_and_docstrings_of_tests_are_in_the_language_of_the_field(name):
    """A test's name is a claim in plain words; BANNED says what to write instead."""
    tree = ast.parse(TESTS[name].read_text(encoding="utf-8"))

    assert [one for claim in claims(tree) for one in banned([claim])] == []


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_in_the_language_of_the_field(name):
    """README, CONTRIBUTING and docs, outside of code; BANNED says what to write instead."""
    assert banned(prose(PAGES[name])) == []


@pytest.mark.parametrize("name", PAGES)
def test_lines_of_prose_are_at_most_120_characters(name):
    """Tables and code are as wide as they need to be."""
    too_long = [line for line, text in prose(PAGES[name]) if len(text) > 120 and not text.lstrip().startswith("|")]

    assert too_long == []
