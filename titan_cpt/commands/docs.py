"""`titan-cpt docs`: open the documentation's site from the disk, without a network."""

from __future__ import annotations

import argparse
import sys
import webbrowser
from pathlib import Path

from titan_cpt.commands.arguments import Subparsers, add_command
from titan_cpt.errors import DataError

_PACKAGE = Path(__file__).parents[1]
SITES = (_PACKAGE.parent / "site", _PACKAGE / "site")  # built in a clone by `mkdocs build`; part of a package


def add_docs(subparsers: Subparsers) -> None:
    """The options of `docs`."""
    docs = add_command(
        subparsers,
        "docs",
        _run,
        "open the documentation in a browser, offline",
        details="The site must have been built: `mkdocs build` in a clone of the repository.",
        example="titan-cpt docs\ntitan-cpt docs --print",
    )
    docs.add_argument("--print", action="store_true", help="print the path of the first page, and open no browser")


def _run(options: argparse.Namespace) -> int:
    page = first_page(SITES)
    if options.print:
        print(page)
    elif not webbrowser.open_new_tab(page.as_uri()):
        print(f"no browser was found; open this file: {page}", file=sys.stderr)
        return 1
    return 0


def first_page(sites: tuple[Path, ...]) -> Path:
    """The first page of the first of these folders that has been built.

    Raises:
        DataError: none has; the message says how to build it.
    """
    for site in sites:
        if (site / "index.html").is_file():
            return site / "index.html"
    root = sites[0].parent
    if (root / "mkdocs.yml").is_file():
        how = f"build it: `cd {root} && ./scripts/setup.sh docs && .venv/bin/mkdocs build`"
    else:
        how = "build it in a clone of the repository: `./scripts/setup.sh docs && .venv/bin/mkdocs build`"
    raise DataError(f"{sites[0]}: the documentation is not built; {how}; docs/*.md there have the same text")
