"""The documentation says what the code does: generated pages are up to date, and the files that it names exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from unit.test_architecture import PACKAGES

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
MODULE = re.compile(r"\btitan_cpt/[\w/]+\.py\b")


def test_the_page_of_all_keys_is_what_the_schema_says():
    """docs/config.md equals the output of the command that it names."""
    made = subprocess.run(
        [sys.executable, ROOT / "scripts" / "docs" / "config_reference.py"], capture_output=True, text=True, check=True
    )

    assert (ROOT / "docs" / "config.md").read_text() == made.stdout


def test_the_page_of_the_architecture_shows_the_imports_of_the_code():
    """Run `python scripts/docs/architecture_diagram.py` after a package has gained or lost an import of another one."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    made = subprocess.run(
        [sys.executable, ROOT / "scripts" / "docs" / "architecture_diagram.py", "--print"],
        capture_output=True,
        text=True,
        check=True,
    )

    assert page == made.stdout


def test_contributing_lists_the_packages_in_the_order_of_the_architecture_test():
    """The first word of each line of the block below "The packages" is an entry of PACKAGES."""
    section = (
        (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## The packages")[2].partition("\n## ")[0]
    )
    listed = re.findall(r"^    (\w+)", section, flags=re.MULTILINE)

    assert tuple(listed) == PACKAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_module_that_a_page_names_exists(page):
    """A path such as titan_cpt/train.py, in a link or not, is a file of the package."""
    named = set(MODULE.findall(page.read_text(encoding="utf-8")))

    assert [path for path in named if not (ROOT / path).is_file()] == []


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
