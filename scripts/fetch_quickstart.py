#!/usr/bin/env python3
"""Fetch the text of the quick start: one set of manuals in English and the same manuals in German.

Two sources are tried in this order:

1. On Debian and its derivatives: `apt-get download` of documentation packages, as any user, into a temporary folder. It
   uses the configured package sources and proxies, and does not change the system's package lists, cache or packages.
2. Elsewhere: articles of wikimedia/wikipedia on the Hugging Face hub, streamed through `datasets`.

Both write DIR/english.jsonl and DIR/german.jsonl, one document per line: {"text", "id", "source"}. Cleaning makes sure
that validation documents share no text with training documents: pages and paragraphs in the other language are removed
(a quarter of some German packages is English), and so is every line that repeats ten consecutive words of an earlier
document (pages share templates).

A second run does nothing: the two files are written under temporary names and renamed when they are complete.
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
"""The quick start needs this much text per language; with less, the next source is tried."""
HUB_DATASET = "wikimedia/wikipedia"
HUB_CONFIGS = {"english": "20231101.en", "german": "20231101.de"}
HUB_ARTICLES = 1000


@dataclass(frozen=True)
class Package:
    """A documentation package, and which of its files are pages in which language."""

    name: str
    language: str
    pages: str
    """Regular expression for the paths of the pages in the package."""


class FetchError(Exception):
    """A source did not give the text; the message says why."""


# The same manuals, page for page, in both languages, in HTML or XML. A package that the system's release lacks is
# skipped: Ubuntu has GNOME's German pages in a separate package.
PACKAGES = (
    Package("libreoffice-help-en-us", "english", r"/help/en-US/text/.*\.html$"),
    Package("libreoffice-help-de", "german", r"/help/de/text/.*\.html$"),
    Package("gnome-user-docs", "english", r"/help/C/.*\.page$"),
    Package("gnome-user-docs", "german", r"/help/de/.*\.page$"),
    Package("gnome-user-docs-de", "german", r"/help/de/.*\.page$"),
    Package("debian-reference-en", "english", r"/(ch|ap|pr)\w+\.en\.html$"),
    Package("debian-reference-de", "german", r"/(ch|ap|pr)\w+\.de\.html$"),
    # developers-reference.html contains all the other pages.
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
        FetchError: apt-get or dpkg-deb is missing or fails, or the package sources have no such packages.
    """
    missing = [tool for tool in ("apt-get", "apt-cache", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise FetchError(f"needs {' and '.join(missing)}, not found on PATH")
    config = write_apt_config(folder)
    say("package lists: apt-get update, into a temporary folder")
    updated = run_apt(config, "apt-get", "update", folder=folder)
    sizes = _available(config, folder)
    if not sizes:
        # Without a network, apt-get update only warns.
        warnings = [line for line in updated.splitlines() if line.startswith("W:")][:2]
        raise FetchError(" ".join(["the package sources offer none of the documentation packages", *warnings]))
    say(f"downloading {len(sizes)} packages, {sum(sizes.values()) / 1e6:.1f} MB: {', '.join(sizes)}")
    run_apt(config, "apt-get", "download", *sizes, folder=folder)
    say("reading the pages")
    wanted = [package for package in PACKAGES if package.name in sizes]
    with ProcessPoolExecutor(max_workers=2) as pool:
        read = pool.map(package_pages, [folder] * len(wanted), wanted)
        by_language: dict[str, list[Page]] = {language: [] for language in LANGUAGES}
        for package, pages in zip(wanted, read, strict=True):
            by_language[package.language] += pages
    return by_language


def write_apt_config(folder: Path) -> Path:
    """Write an apt.conf that keeps apt's state, lists and cache in `folder`, and return its path.

    apt reads it after the system's configuration, so sources, keys and proxies are the system's. It clears the hooks of
    `apt-get update`, which would change the system, and the lists that only software centers need.
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
        'Dir::Cache::pkgcache "pkgcache.bin";',  # container images disable it: every call would parse the lists again
        'Dir::Cache::srcpkgcache "srcpkgcache.bin";',
        'APT::Sandbox::User "root";',  # apt would otherwise download as a user who may not enter this folder
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
    """Return the download size in bytes of the newest version of each available package, in the order of PACKAGES."""
    names = list(dict.fromkeys(package.name for package in PACKAGES))
    # One call for all: each one may read the package lists again. It fails if one package is missing.
    shown = run_apt(config, "apt-cache", "--no-all-versions", "show", *names, folder=folder, may_fail=True)
    sizes: dict[str, int] = {}
    for record in shown.split("\n\n"):
        name, size = (re.search(rf"^{field}: (\S+)$", record, flags=re.MULTILINE) for field in ("Package", "Size"))
        if name and size:
            sizes[name[1]] = int(size[1])
    return {name: sizes[name] for name in names if name in sizes}


def run_apt(config: Path, tool: str, *arguments: str, folder: Path, may_fail: bool = False) -> str:
    """Run one of apt's tools in `folder` and return its output, warnings last."""
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
    """Return the pages of the package whose .deb is in `folder`, without extracting it to disk."""
    archive = next(iter(sorted(folder.glob(f"{package.name}_*.deb"))), None)
    if archive is None:
        raise FetchError(f"apt-get download wrote no file for {package.name}")
    markups: dict[str, str] = {}
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None, "Popen was given stdout=PIPE"
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
        raise FetchError(f"{archive.name} contains a page that is not well-formed XML: {error}") from error
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
        from datasets import load_dataset  # imported here: it takes seconds, and the first source does not need it
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
        except Exception as error:  # the client raises many types: network, HTTP, a missing config, parsing
            reason = " ".join(str(error).split())[:200]
            raise FetchError(f"{dataset} {config} could not be read: {type(error).__name__}: {reason}") from error
    return by_language


def fetch(output: Path) -> None:
    """Write both files into `output`, from the first source that works.

    Raises:
        FetchError: no source works; the message has the reason for each.
    """
    failures = []
    for name, source in (("Debian packages", _by_packages), ("the Hugging Face hub", hub_pages)):
        try:
            cleaned = clean_in_parallel(source())
            for language, (pages, _) in cleaned.items():
                size = sum(len(joined(page.lines).encode()) for page in pages)
                if size < MIN_LANGUAGE_BYTES:
                    raise FetchError(f"has only {size / 1e6:.2f} MB of {language} text")
        except FetchError as error:
            failures.append(f"  - {name}: {error}")
            say(f"{name}: {error}")
            continue
        write(cleaned, output)
        return
    raise FetchError(
        "no source of the quick start's text is available:\n" + "\n".join(failures) + "\n"
        f"Make one of the two available, or put your own English and German text at {output}/english.jsonl and "
        f'{output}/german.jsonl, one document per line: {{"text": "..."}}.'
    )


def clean_in_parallel(by_language: dict[str, list[Page]]) -> dict[str, tuple[list[Page], Dropped]]:
    """Return `clean`'s results by language, each from a process of its own."""
    with ProcessPoolExecutor(max_workers=len(by_language)) as pool:
        cleaned = pool.map(clean, by_language.values(), by_language)
        return dict(zip(by_language, cleaned, strict=True))


def _by_packages() -> dict[str, list[Page]]:
    with tempfile.TemporaryDirectory(prefix="titan-cpt-quickstart-") as folder:
        return debian_pages(Path(folder))


def write(cleaned: dict[str, tuple[list[Page], Dropped]], output: Path) -> None:
    """Write DIR/<language>.jsonl for each language and print a summary; both are renamed when both are complete."""
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
        if path.exists():  # the user's own text, when only the other language was missing
            partial.unlink()
            say(f"{path}: exists already and is not changed")
        else:
            partial.replace(path)


def summary(path: Path, pages: list[Page], dropped: Dropped) -> str:
    """One line about a language: size, documents, and the share of the text that cleaning removed, by reason."""
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
    return f"{path}: {size / 1e6:.2f} MB of text, {len(pages)} documents (removed of {read_mb:.2f} MB: {shares})"


def say(message: str) -> None:
    """Print a message immediately, also to a pipe."""
    print(f"fetch_quickstart: {message}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 no source of the text is available."""
    parser = argparse.ArgumentParser(description="Fetch English and German text for the quick start.")
    parser.add_argument(
        "--output", type=Path, default=Path("data/quickstart"), metavar="DIR", help="default: %(default)s"
    )
    output: Path = parser.parse_args(arguments).output
    if all((output / f"{language}.jsonl").is_file() for language in LANGUAGES):
        say(f"{output}/english.jsonl and {output}/german.jsonl exist: nothing to do")
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
        print("fetch_quickstart: interrupted; no incomplete file remains, run it again", file=sys.stderr)
        return 130
    say(f"done in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a hub stream that was not read completely can abort or hang the interpreter at exit
    # (pyarrow; huggingface/datasets#7467). All files are written and closed by now.
    os._exit(status)
