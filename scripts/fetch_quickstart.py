#!/usr/bin/env python3
"""Fetch the text of the quick start: one set of manuals in English and the same manuals in German.

Two routes, tried in this order:

1. Debian and its relatives: `apt-get download` of documentation packages, as any user, into a temporary folder. The
   system's package lists, cache and installed packages are not touched; the sources and proxies configured are used.
2. Anywhere else: articles of the hub's wikimedia/wikipedia, streamed through `datasets`.

Both write DIR/english.jsonl and DIR/german.jsonl, a document a line: {"text", "id", "source"}. The text is cleaned so
that a hold-out by document is honest: pages and paragraphs in the other language are left out (a quarter of some German
packages is English), and so is every line that repeats ten words in a row of an earlier document (templates repeat
between pages).

Run again, it does nothing: the two files are written under temporary names and renamed when they are complete.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from manual_text import Dropped, Page, article_lines, clean, html_lines, joined, mallard_lines, mallard_titles

LANGUAGES = ("english", "german")
MIN_LANGUAGE_BYTES = 1_000_000
"""Less text than this per language does not carry the quick start: the next route is tried."""
HUB_DATASET = "wikimedia/wikipedia"
HUB_CONFIGS = {"english": "20231101.en", "german": "20231101.de"}
HUB_ARTICLES = 1000


@dataclass(frozen=True)
class Package:
    """A documentation package: which of its files are pages of which language."""

    name: str
    language: str
    pages: str
    """Regular expression for the paths of the pages inside the package."""


class FetchError(Exception):
    """One route did not lead to the text; the message says why."""


# Page for page the same manuals in both languages, none of which needs more than HTML or XML to be read. A package
# that the system's release does not have is passed over: Ubuntu keeps GNOME's German pages in a package of their own.
PACKAGES = (
    Package("libreoffice-help-en-us", "english", r"/help/en-US/text/.*\.html$"),
    Package("libreoffice-help-de", "german", r"/help/de/text/.*\.html$"),
    Package("gnome-user-docs", "english", r"/help/C/.*\.page$"),
    Package("gnome-user-docs", "german", r"/help/de/.*\.page$"),
    Package("gnome-user-docs-de", "german", r"/help/de/.*\.page$"),
    Package("debian-reference-en", "english", r"/(ch|ap|pr)\w+\.en\.html$"),
    Package("debian-reference-de", "german", r"/(ch|ap|pr)\w+\.de\.html$"),
    # developers-reference.html is all the other pages in one.
    Package("developers-reference", "english", r"/(?!developers-reference|index|search|genindex)[\w-]+\.html$"),
    Package("developers-reference-de", "german", r"/(?!developers-reference|index|search|genindex)[\w-]+\.html$"),
    Package("debian-faq", "english", r"/(?!index)[\w-]+\.en\.html$"),
    Package("debian-faq-de", "german", r"/(?!index)[\w-]+\.de\.html$"),
    Package("maint-guide", "english", r"/html/(?!index)\w+\.en\.html$"),
    Package("maint-guide-de", "german", r"/html/(?!index)\w+\.de\.html$"),
)


def debian_pages(folder: Path) -> dict[str, list[Page]]:
    """Download the packages into `folder` and return their pages by language.

    Raises:
        FetchError: there is no apt-get or dpkg-deb, or it could not download enough.
    """
    missing = [tool for tool in ("apt-get", "apt-cache", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise FetchError(f"needs {' and '.join(missing)}, not found on PATH")
    config = write_apt_config(folder)
    say("package lists: apt-get update, into a temporary folder")
    updated = _apt(config, "apt-get", "update", folder=folder)
    sizes = _available(config, folder)
    if not sizes:
        # Without a network, apt-get update only warns.
        warnings = [line for line in updated.splitlines() if line.startswith("W:")][:2]
        raise FetchError(" ".join(["the package sources offer none of the documentation packages", *warnings]))
    say(f"downloading {len(sizes)} packages, {sum(sizes.values()) / 1e6:.1f} MB: {', '.join(sizes)}")
    _apt(config, "apt-get", "download", *sizes, folder=folder)
    say("reading the pages")
    wanted = [package for package in PACKAGES if package.name in sizes]
    with ProcessPoolExecutor(max_workers=2) as pool:
        read = pool.map(package_pages, [folder] * len(wanted), wanted)
        by_language: dict[str, list[Page]] = {language: [] for language in LANGUAGES}
        for package, pages in zip(wanted, read, strict=True):
            by_language[package.language] += pages
    return by_language


def write_apt_config(folder: Path) -> Path:
    """Write the apt.conf that keeps apt's state, lists and cache inside `folder`, and return its path.

    It is read after the system's configuration, so that sources, keys and proxies are the system's. Hooks of
    `apt-get update` are cleared, for they work on the system; so are lists that only desktops' software centres need.
    """
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    (folder / "state/status").touch()
    unneeded = ("DEP-11", "DEP-11-icons", "DEP-11-icons-small", "DEP-11-icons-large", "DEP-11-icons-hidpi", "CNF")
    lines = [
        f'Dir::State "{folder}/state";',
        f'Dir::State::Lists "{folder}/state/lists";',
        f'Dir::State::Status "{folder}/state/status";',
        f'Dir::Cache "{folder}/cache";',
        'APT::Sandbox::User "root";',  # root's apt would hand downloads to a user who may not enter this folder
        'Acquire::Languages "none";',
        'Acquire::Retries "2";',
        'Acquire::http::Timeout "20";',
        'Acquire::https::Timeout "20";',
        "#clear APT::Update::Pre-Invoke;",
        "#clear APT::Update::Post-Invoke;",
        "#clear APT::Update::Post-Invoke-Success;",
        "#clear Acquire::IndexTargets::deb-src;",
        *(f"#clear Acquire::IndexTargets::deb::{target};" for target in unneeded),
    ]
    config = folder / "apt.conf"
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return config


def _available(config: Path, folder: Path) -> dict[str, int]:
    """Download size in bytes of each package of PACKAGES that the sources offer (of the newest version)."""
    sizes: dict[str, int] = {}
    for name in dict.fromkeys(package.name for package in PACKAGES):
        shown = _apt(config, "apt-cache", "--no-all-versions", "show", name, folder=folder, may_fail=True)
        if match := re.search(r"^Size: (\d+)$", shown, flags=re.MULTILINE):
            sizes[name] = int(match[1])
    return sizes


def _apt(config: Path, tool: str, *arguments: str, folder: Path, may_fail: bool = False) -> str:
    """Run one of apt's tools in `folder` and return what it printed, warnings last."""
    done = subprocess.run(
        [tool, "--config-file", str(config), "--quiet", *arguments],
        cwd=folder,
        env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and not may_fail:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
        raise FetchError(f"{tool} {arguments[0]} failed: {' '.join(reasons[:3]) or f'status {done.returncode}'}")
    return done.stdout + done.stderr


def package_pages(folder: Path, package: Package) -> list[Page]:
    """Return the pages of the package whose .deb lies in `folder`; nothing is unpacked to disk."""
    archive = next(iter(sorted(folder.glob(f"{package.name}_*.deb"))), None)
    if archive is None:
        raise FetchError(f"apt-get download left no file for {package.name}")
    markups: dict[str, str] = {}
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None, "stdout was asked for"
        with tarfile.open(fileobj=process.stdout, mode="r|") as members:
            for member in members:
                if member.isfile() and re.search(package.pages, member.name):
                    content = members.extractfile(member)
                    assert content is not None, f"{member.name} is a regular file"
                    markups[member.name.removeprefix("./")] = content.read().decode("utf-8", errors="replace")
    if process.returncode:
        raise FetchError(f"dpkg-deb could not read {archive.name} (status {process.returncode})")
    try:
        titles = mallard_titles(markup for path, markup in markups.items() if path.endswith(".page"))
    except ElementTree.ParseError as error:
        raise FetchError(f"{archive.name} holds a page that is not well-formed XML: {error}") from error
    source = f"{package.name}-{package.language}" if package.name == "gnome-user-docs" else package.name
    return [
        Page(
            f"{package.name}/{path.removeprefix('usr/share/')}",
            source,
            mallard_lines(markup, titles) if path.endswith(".page") else html_lines(markup),
        )
        for path, markup in markups.items()
    ]


def hub_pages(dataset: str = HUB_DATASET, articles: int = HUB_ARTICLES) -> dict[str, list[Page]]:
    """Return the first `articles` articles of each language's Wikipedia, streamed from the hub.

    Raises:
        FetchError: `datasets` is not installed, or the hub cannot be reached.
    """
    try:
        from datasets import load_dataset  # seconds of imports that the first route does without
    except ImportError as error:
        raise FetchError(f"needs the package `datasets`, which this Python does not have ({error})") from error
    by_language: dict[str, list[Page]] = {}
    for language in LANGUAGES:
        config = HUB_CONFIGS[language]
        say(f"streaming {articles} articles of {dataset} {config} from the hub")
        try:
            rows = load_dataset(dataset, config, split="train", streaming=True).take(articles)
            by_language[language] = [
                Page(f"{dataset}/{config}/{row['id']}", dataset, article_lines(row["text"])) for row in rows
            ]
        except Exception as error:  # the hub's client fails in many types: network, HTTP, a missing config, parsing
            reason = " ".join(str(error).split())[:200]
            raise FetchError(f"{dataset} {config} could not be read: {type(error).__name__}: {reason}") from error
    return by_language


def fetch(output: Path) -> None:
    """Write both files into `output` by the first route that leads there.

    Raises:
        FetchError: none does; the message names each route and what stopped it.
    """
    failures = []
    for name, route in (("Debian packages", _by_packages), ("the Hugging Face hub", hub_pages)):
        try:
            cleaned = {language: clean(pages, language) for language, pages in route().items()}
            for language, (pages, _) in cleaned.items():
                size = sum(len(joined(page.lines).encode()) for page in pages)
                if size < MIN_LANGUAGE_BYTES:
                    raise FetchError(f"led to only {size / 1e6:.2f} MB of {language} text")
        except FetchError as error:
            failures.append(f"  - {name}: {error}")
            say(f"{name}: {error}")
            continue
        write(cleaned, output)
        return
    raise FetchError(
        "no route leads to the quick start's text:\n" + "\n".join(failures) + "\n"
        f"Give this machine one of the two, or put an English and a German text of your own at {output}/english.jsonl "
        f'and {output}/german.jsonl, a document a line: {{"text": "..."}}.'
    )


def _by_packages() -> dict[str, list[Page]]:
    with tempfile.TemporaryDirectory(prefix="titan-cpt-quickstart-") as folder:
        return debian_pages(Path(folder))


def write(cleaned: dict[str, tuple[list[Page], Dropped]], output: Path) -> None:
    """Write DIR/<language>.jsonl for each language and say what is in it; the names appear when all is written."""
    output.mkdir(parents=True, exist_ok=True)
    renames = []
    for language, (pages, dropped) in cleaned.items():
        path = output / f"{language}.jsonl"
        partial = path.with_suffix(f".jsonl.partial-{os.getpid()}")
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            for page in pages:
                row = {"text": joined(page.lines), "id": page.id, "source": page.source}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        renames.append((partial, path))
        say(summary(path, pages, dropped))
    for partial, path in renames:
        if path.exists():  # a text of the user's own, of which the other language was missing
            partial.unlink()
            say(f"{path}: was there already and stays as it is")
        else:
            partial.replace(path)


def summary(path: Path, pages: list[Page], dropped: Dropped) -> str:
    """One line on a language: size, documents, and the share of the text read that cleaning left out, by reason."""
    size = sum(len(joined(page.lines).encode()) for page in pages)
    shares = ", ".join(
        f"{100 * part / dropped.read_bytes:.1f} % {reason}"
        for part, reason in (
            (dropped.repeated_bytes, "repeats"),
            (dropped.other_language_bytes, "not in the language"),
            (dropped.fragment_bytes, "fragments"),
        )
    )
    read_mb = dropped.read_bytes / 1e6
    return f"{path}: {size / 1e6:.2f} MB of text, {len(pages)} documents (left out of {read_mb:.2f} MB: {shares})"


def say(message: str) -> None:
    """Tell the user, at once, also through a pipe."""
    print(f"fetch_quickstart: {message}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 no route leads to the text."""
    parser = argparse.ArgumentParser(description="Fetch English and German text for the quick start.")
    parser.add_argument(
        "--output", type=Path, default=Path("data/quickstart"), metavar="DIR", help="default: %(default)s"
    )
    output: Path = parser.parse_args(arguments).output
    if all((output / f"{language}.jsonl").is_file() for language in LANGUAGES):
        say(f"{output}/english.jsonl and {output}/german.jsonl are there: nothing to do")
        return 0
    started = time.monotonic()
    try:
        fetch(output)
    except FetchError as error:
        print(f"fetch_quickstart: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"fetch_quickstart: {output} is not complete: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fetch_quickstart: interrupted; nothing is left half done, run it again", file=sys.stderr)
        return 130
    say(f"done in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a hub stream that was not read to its end can abort or hang the interpreter on its way out
    # (pyarrow; huggingface/datasets#7467). Everything is written and closed by now.
    os._exit(status)
