"""The documentation says what the code does: generated pages are up to date, and the files that it names exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from titan_cpt.cli import parse_command_line
from titan_cpt.config.schema import Config
from titan_cpt.config.schema_lookup import keys_of, tables_at
from unit.test_architecture import PACKAGES

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
MODULE = re.compile(r"\btitan_cpt/[\w/]+\.py\b")
SCRIPT = re.compile(r"(?<![\w/])(?:scripts|tests)/[\w/]+\.(?:py|sh|sbatch)\b")
TABLES = set(keys_of(Config))
KEY = re.compile(r"`([a-z]\w*(?:\.[\w-]+)+)(?<!\.json)(?<!\.jsonl)(?<!\.toml)(?<!\.py)`")
OF_OTHER_PROJECTS = [  # pages that name files and keys that are not ours: those of other projects, and mistakes
    ROOT / "docs" / "comparison_with_peers.md",
    ROOT / "docs" / "mistakes.md",
    ROOT / "docs" / "guides" / "convert_config.md",
    *ROOT.glob("docs/guides/migrate_*.md"),
]
OURS = [page for page in PAGES if page not in OF_OTHER_PROJECTS]


def test_the_page_of_all_keys_is_what_the_schema_says():
    """docs/config.md equals the output of the command that it names."""
    made = subprocess.run(
        [sys.executable, ROOT / "scripts" / "docs" / "config_reference.py"], capture_output=True, text=True, check=True
    )

    assert (ROOT / "docs" / "config.md").read_text() == made.stdout


def test_the_page_of_all_commands_is_what_the_parsers_say():
    """docs/cli.md equals the output of the command that it names."""
    made = subprocess.run(
        [sys.executable, ROOT / "scripts" / "docs" / "cli_reference.py"], capture_output=True, text=True, check=True
    )

    assert (ROOT / "docs" / "cli.md").read_text() == made.stdout


def test_the_page_of_the_architecture_shows_the_imports_of_the_code():
    """Run `python scripts/docs/architecture_diagram.py` after a package has gained or lost an import of another one."""
    script = ROOT / "scripts" / "docs" / "architecture_diagram.py"
    made = [
        subprocess.run([sys.executable, script, option], capture_output=True, text=True, check=True).stdout
        for option in ("--print", "--print-svg")
    ]

    assert (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8") == made[0]
    assert (ROOT / "docs" / "packages.svg").read_text(encoding="utf-8") == made[1]


def test_contributing_lists_the_packages_in_the_order_of_the_architecture_test():
    """The first word of each line of the block below "The packages" is an entry of PACKAGES."""
    section = (
        (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## The packages")[2].partition("\n## ")[0]
    )
    listed = re.findall(r"^(\w+) {2,}\w", section, flags=re.MULTILINE)

    assert tuple(listed) == PACKAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_module_that_a_page_names_exists(page):
    """A path such as titan_cpt/train.py, in a link or not, is a file of the package."""
    named = set(MODULE.findall(page.read_text(encoding="utf-8")))

    assert [path for path in named if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("page", OURS, ids=lambda page: page.name)
def test_every_script_and_test_that_a_page_names_exists(page):
    """A path such as scripts/bench/run.sh, in a command or not, is a file of the repository."""
    named = set(SCRIPT.findall(page.read_text(encoding="utf-8")))

    assert [path for path in named if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_has_the_options_and_keys_that_a_page_gives_it(page):
    """Every `titan-cpt` and `./run_train.sh` command of a page is parsed as the command line parses it."""
    for words in commands(page):
        options = parse_command_line(words)
        assert [key for key, _ in options.overrides if not is_key(key)] == [], words


@pytest.mark.parametrize("page", OURS, ids=lambda page: page.name)
def test_every_config_key_that_a_page_names_exists(page):
    """`checkpoint.interval` is a key of the schema."""
    named = {key for key in KEY.findall(page.read_text(encoding="utf-8")) if key.partition(".")[0] in TABLES}

    assert [key for key in named if not is_key(key)] == []


def commands(page):
    """The arguments of every command on a page, in a code block or inline; placeholders such as N become values."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in [line.strip() for line in text.splitlines()] + re.findall(r"`([^`]+)`", text):
        command = re.match(r"(?:\w+=\S+ )?(titan-cpt|\./run_train\.sh) (.*)", line)
        if command is None:
            continue
        words = shlex.split(re.sub(r"[][]|\.\.\.", "", command[2]), comments=True)
        words = ["1" if word == "N" else word for word in words if word != "$short"]
        if command[1] == "./run_train.sh":
            words = ["train", *words]
        if len(words) > 1 and "--help" not in words:
            yield words


def is_key(dotted):
    """Whether the schema has a key."""
    *tables, key = dotted.split(".")
    return any(key in keys_of(table) for table in tables_at(tables))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page):
    """A page links to files that exist."""
    broken = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]

    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_section_leads_to_a_heading(page):
    """`#one-gpu` needs a heading "One GPU" on the page of the link."""
    links = re.findall(r"\]\(([^):#]*)#([^)]+)\)", page.read_text(encoding="utf-8"))
    broken = [
        f"{path}#{anchor}" for path, anchor in links if anchor not in anchors(page.parent / path if path else page)
    ]

    assert broken == []


def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_reading_order_is_ten_files():
    """docs/reading_order.md names ten files, no more."""
    files = re.findall(r"^\d+\. \[", (ROOT / "docs" / "reading_order.md").read_text(), flags=re.MULTILINE)

    assert len(files) == 10
