"""The documentation says what the code does: generated pages are up to date, and what they name is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def test_the_page_of_all_keys_is_what_the_schema_says():
    """docs/config.md equals the output of the command that it names."""
    made = subprocess.run(
        [sys.executable, ROOT / "scripts" / "docs" / "config_reference.py"], capture_output=True, text=True, check=True
    )

    assert (ROOT / "docs" / "config.md").read_text() == made.stdout


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")]), ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page):
    """A page links to files that are there."""
    broken = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]

    assert broken == []


def test_the_reading_order_is_ten_files():
    """docs/reading_order.md names ten files, no more."""
    files = re.findall(r"^\d+\. \[", (ROOT / "docs" / "reading_order.md").read_text(), flags=re.MULTILINE)

    assert len(files) == 10
