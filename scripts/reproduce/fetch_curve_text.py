"""Fetch the text of the curve over tokens: manuals in English and in German, and other English documentation.

    python scripts/reproduce/fetch_curve_text.py data/curve

`apt-get download` of documentation packages, as any user, into a temporary folder; needs a Debian-like system with the
packages' component `main`. Writes SOURCE.jsonl and SOURCE-heldout.jsonl of every source, one document a line: {"text",
"id", "source"}, and sources.json: packages with their versions, and what cleaning removed. Manual pages become text by
the program mandoc, which is downloaded as a package too. A second run fetches only sources whose files are missing.

Cleaning, in this order:

1. Text in the other language, lines that repeat ten consecutive words of an earlier document of the same source, and
   fragments are removed (manual_text.py).
2. The hash of a document's id sets one document in 25 aside for validation.
3. A line of a validation document that shares ten consecutive words with a training document of any source is removed,
   and validation documents of which less than 30 words remain.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fetch_quickstart import FetchError, Package, run_apt, write_apt_config
from manual_text import (
    BODY,
    MIN_DOCUMENT_WORDS,
    Line,
    Page,
    clean,
    html_lines,
    joined,
    mallard_lines,
    repeat_keys,
    words_of,
)

ONE_IN = 25
"""The share of documents that are set aside for validation is 1 / ONE_IN."""
_PAGE = r"/(?!genindex|search|py-modindex|index|developers-reference\.html)[\w.+-]+\.html(\.gz)?$"
_MAN = r"/man\d/[^/]+\.gz$"


@dataclass(frozen=True)
class Source:
    """A source of text: packages of one language and kind.

    Attributes:
        licence: of the packages' documentation, as their copyright files have it.
        packages: name (a regular expression: the last match in natural order counts) and paths of the pages.
    """

    name: str
    language: str
    licence: str
    packages: tuple[tuple[str, str], ...]


def _guides(language: str, code: str, help_code: str, mallard: str, names: Sequence[str]) -> Source:
    return Source(
        f"guides_{code}",
        language,
        "MPL 2.0 (LibreOffice), CC BY-SA 3.0 and 4.0, GFDL (GIMP, LilyPond), GPL 2 and 3 (Debian, KiCad), by package",
        (
            (f"libreoffice-help-{'en-us' if code == 'en' else code}", rf"/help/{help_code}/text/.*\.html$"),
            ("gnome-user-docs", rf"/help/{mallard}/.*\.page$"),
            (f"gimp-help-{code}", rf"/help/{code}/" + _PAGE[1:]),
            ("debian-handbook", rf"/html/{'en-US' if code == 'en' else 'de-DE'}/" + _PAGE[1:]),
            ("installation-guide-amd64", rf"/{code}[./].*\.html$"),
            (f"debian-edu-doc-{code}", r"\.html$"),
            *((name, _PAGE) for name in names),
        ),
    )


SOURCES = (
    _guides(
        "english",
        "en",
        "en-US",
        "C",
        (
            "debian-reference-en",
            "developers-reference",
            "debian-faq",
            "maint-guide",
            "lilypond-doc-html",
            "kicad-doc-en",
            "ubuntu-packaging-guide-html",
        ),
    ),
    _guides(
        "german",
        "de",
        "de",
        "de",
        (
            "debian-reference-de",
            "developers-reference-de",
            "debian-faq-de",
            "maint-guide-de",
            "lilypond-doc-html-de",
            "kicad-doc-de",
            "ubuntu-packaging-guide-html-de",
            "debian-paketmanagement-buch",
        ),
    ),
    Source(
        "manpages_en",
        "english",
        "several free licences, a page each (GPL, BSD, Linux man-pages' verbatim licence)",
        (("manpages", _MAN), ("manpages-dev", _MAN)),
    ),
    Source(
        "manpages_de",
        "german",
        "GPL 3+ for the translation, the licence of each original page",
        (("manpages-de", r"/de/man\d/[^/]+\.gz$"), ("manpages-de-dev", r"/de/man\d/[^/]+\.gz$")),
    ),
    Source("linux", "english", "GPL 2", ((r"linux-doc-\d[\d.]*", r"/html/(?!translations/|genindex).*\.html$"),)),
    Source("postgresql", "english", "PostgreSQL licence", ((r"postgresql-doc-\d+", r"/html/" + _PAGE[1:]),)),
    Source(
        "python", "english", "PSF licence 2", ((r"python3\.\d+-doc", r"/html/(?!genindex|search|contents).*\.html$"),)
    ),
    Source("django", "english", "BSD 3-clause", (("python-django-doc", r"/html/(?!genindex|search).*\.html$"),)),
    Source("apache", "english", "Apache 2.0", (("apache2-doc", r"\.html\.en$|/en/.*\.html$"),)),
    Source("git", "english", "GPL 2+", (("git-doc", _PAGE),)),
    Source("cmake", "english", "BSD 3-clause", (("cmake-doc", r"/html/(?!genindex|search).*\.html$"),)),
    Source("qt", "english", "GFDL 1.3 without invariant sections", (("qtbase5-doc-html", r"\.html$"),)),
    Source("sqlite", "english", "public domain", (("sqlite3-doc", r"\.html$"),)),
    Source("erlang", "english", "Apache 2.0", (("erlang-doc", r"/html/.*\.html(\.gz)?$"),)),
    Source("anarchism", "english", "GPL 2", (("anarchism", r"/html/.*\.html$"),)),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 2 if the text is not available."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--debs", type=Path, metavar="DIR", help="downloaded packages, instead of the network")
    parser.add_argument("--sources", metavar="A,B", help="only these (default: all)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (default 2)")
    parser.add_argument(
        "--check", action="store_true", help="only print what each validation file shares with training"
    )
    options = parser.parse_args(arguments)
    if options.check:
        print(check(options.folder))
        return 0
    names = options.sources.split(",") if options.sources else [source.name for source in SOURCES]
    if unknown := sorted(set(names) - {source.name for source in SOURCES}):
        parser.error(f"--sources: unknown {', '.join(unknown)}; there are {', '.join(each.name for each in SOURCES)}")
    wanted = [each for each in SOURCES if each.name in names and not (options.folder / f"{each.name}.jsonl").exists()]
    if not wanted:
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="titan-cpt-curve-") as temporary:
            folder = options.debs or download(wanted, Path(temporary))
            tools = mandoc(folder, Path(temporary))
            with ProcessPoolExecutor(options.jobs) as pool:
                cleaned = list(pool.map(partial(read, folder=folder, mandoc=tools), wanted))
    except (FetchError, OSError) as error:
        print(f"fetch_curve_text: {error}; nothing was written", file=sys.stderr)
        return 2
    write(dict(zip((source.name for source in wanted), cleaned, strict=True)), options.folder)
    return 0


def download(wanted: Sequence[Source], folder: Path) -> Path:
    """Download the packages that the system's sources offer; a missing one is named and skipped."""
    config = write_apt_config(folder)
    say("package lists: apt-get update, into a temporary folder")
    run_apt(config, "apt-get", "update", folder=folder)
    offered = run_apt(config, "apt-cache", "pkgnames", folder=folder).split()
    patterns = dict.fromkeys(["mandoc", *(name for source in wanted for name, _ in source.packages)])
    chosen = {pattern: newest(pattern, offered) for pattern in patterns}
    if missing := [pattern for pattern, name in chosen.items() if name is None]:
        say(f"not offered here, skipped: {', '.join(missing)}")
    names = [name for name in chosen.values() if name is not None]
    if not names:
        raise FetchError("the package sources offer none of the documentation packages")
    say(f"downloading {len(names)} packages")
    run_apt(config, "apt-get", "download", *names, folder=folder)
    return folder


def newest(pattern: str, names: Iterable[str]) -> str | None:
    """The name that matches and is last in natural order: python3.11-doc after python3.9-doc."""
    matching = [name for name in names if re.fullmatch(pattern, name)]
    return max(matching, key=lambda name: [int(part) for part in re.findall(r"\d+", name)], default=None)


def deb_of(pattern: str, folder: Path) -> Path | None:
    """The downloaded file of a package."""
    by_name = {path.name.partition("_")[0]: path for path in folder.glob("*.deb")}
    name = newest(pattern, by_name)
    return by_name[name] if name is not None else None


def mandoc(folder: Path, temporary: Path) -> Path | None:
    """The program mandoc, unpacked from its package; None without the package."""
    deb = deb_of("mandoc", folder)
    if deb is None:
        say("mandoc is not offered here: no manual pages")
        return None
    subprocess.run(["dpkg-deb", "-x", str(deb), str(temporary / "mandoc")], check=True)
    return next(path for path in (temporary / "mandoc").rglob("mandoc") if path.is_file() and path.parent.name == "bin")


@dataclass(frozen=True)
class Cleaned:
    """A source's documents, and where they come from.

    Attributes:
        debs: file names of its packages, which contain their versions.
        removed: bytes by reason.
    """

    source: Source
    pages: list[Page]
    debs: list[str]
    removed: dict[str, int]


def read(source: Source, *, folder: Path, mandoc: Path | None) -> Cleaned:
    """The cleaned documents of a source."""
    pages: list[Page] = []
    debs = []
    for pattern, paths in source.packages:
        deb = deb_of(pattern, folder)
        if deb is None:
            continue
        debs.append(deb.name)
        package = Package(deb.name.partition("_")[0], source.language, paths)
        pages += [page for page in pages_of(deb, package, source.name, mandoc) if page.lines]
    kept, dropped = clean(pages, source.language)
    removed = {
        "repeats": dropped.repeated_bytes,
        "other language": dropped.other_language_bytes,
        "fragments": dropped.fragment_bytes,
    }
    size = sum(len(joined(page.lines).encode()) for page in kept)
    say(f"{source.name}: {len(kept)} documents, {size / 1e6:.2f} MB of {dropped.read_bytes / 1e6:.2f} MB kept")
    return Cleaned(source, kept, debs, removed)


def pages_of(deb: Path, package: Package, source: str, mandoc: Path | None) -> Iterator[Page]:
    """The pages of a package: HTML, GNOME's help, or manual pages; compressed or not."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None, "Popen was given stdout=PIPE"
        with tarfile.open(fileobj=process.stdout, mode="r|") as members:
            for member in members:
                if not member.isfile() or not re.search(package.pages, member.name):
                    continue
                content = members.extractfile(member)
                assert content is not None, f"{member.name} is a regular file"
                data = content.read()
                data = gzip.decompress(data) if member.name.endswith(".gz") else data
                path = member.name.removeprefix("./").removeprefix("usr/share/")
                yield Page(f"{package.name}/{path}", source, _lines(path, data, mandoc))
    if process.returncode:
        raise FetchError(f"dpkg-deb could not read {deb.name} (status {process.returncode})")


def _lines(path: str, data: bytes, mandoc: Path | None) -> list[Line]:
    if re.search(r"/man\d/", path):
        if mandoc is None or data.startswith(b".so "):  # a link to another page
            return []
        words = [str(mandoc), "-T", "html", "-K", "utf-8", "-O", "fragment"]
        done = subprocess.run(words, input=data, capture_output=True, check=False)  # warns by its status
        return html_lines(done.stdout.decode(errors="replace"))
    markup = data.decode("utf-8", errors="replace")
    return mallard_lines(markup) if path.endswith(".page") else html_lines(markup)


def is_validation(page_id: str) -> bool:
    """Whether the hash of its id sets a document aside."""
    return int(hashlib.sha256(page_id.encode()).hexdigest(), 16) % ONE_IN == 0


def without_training_text(validation: Sequence[Page], training: Iterable[Page]) -> list[Page]:
    """The validation documents without the lines that share ten consecutive words with a training document.

    Keys of the training documents are not kept: only those of the validation documents are in memory.
    """
    ours = {key for page in validation for line in page.lines for key in repeat_keys(line.text)}
    seen: set[str] = set()
    for page in training:
        for line in page.lines:
            seen.update(ours.intersection(repeat_keys(line.text)))
    kept = []
    for page in validation:
        lines = [line for line in page.lines if seen.isdisjoint(repeat_keys(line.text))]
        if len(words_of(joined(lines))) >= MIN_DOCUMENT_WORDS:
            kept.append(Page(page.id, page.source, lines))
    return kept


def check(folder: Path) -> str:
    """Markdown: for every validation file, how many of its 10-grams any training file of the folder has."""
    ours = {path: _keys(path) for path in sorted(folder.glob("*-heldout.jsonl"))}
    every = set().union(*ours.values())
    seen: set[str] = set()
    for path in sorted(folder.glob("*.jsonl")):
        if path not in ours:
            for text in _texts(path):
                seen.update(key for line in text.split("\n") for key in repeat_keys(line) if key in every)
    rows = ["| validation file | 10-grams | in training text | |", "|---|---|---|---|"]
    for path, keys in ours.items():
        shared = len(keys & seen)
        rows.append(f"| {path.stem} | {len(keys):,} | {shared:,} | {100 * shared / max(1, len(keys)):.3f} % |")
    return "\n".join(rows)


def _keys(path: Path) -> set[str]:
    return {key for text in _texts(path) for line in text.split("\n") for key in repeat_keys(line)}


def _texts(path: Path) -> Iterator[str]:
    with path.open() as file:
        for line in file:
            yield json.loads(line)["text"]


def write(cleaned: dict[str, Cleaned], folder: Path) -> None:
    """Write both files of every source, and sources.json."""
    training = [page for each in cleaned.values() for page in each.pages if not is_validation(page.id)]
    training += _existing_training(folder)
    set_aside = [page for each in cleaned.values() for page in each.pages if is_validation(page.id)]
    validation = without_training_text(set_aside, training)
    record_file = folder / "sources.json"
    record = json.loads(record_file.read_text()) if record_file.exists() else {}
    for name, each in cleaned.items():
        parts = {"-heldout": [page for page in validation if page.source == name]}
        parts[""] = [page for page in training if page.source == name]  # last: it marks the source as complete
        for part, pages in parts.items():
            path = folder / f"{name}{part}.jsonl"
            partial_file = path.with_suffix(".jsonl.partial")
            partial_file.write_text("".join(_row(page) for page in pages))
            partial_file.replace(path)
        record[name] = {"licence": each.source.licence, "packages": each.debs, "removed_bytes": each.removed}
        record[name] |= {
            "training_bytes": _bytes(parts[""]),
            "validation_bytes": _bytes(parts["-heldout"]),
            "validation_removed_bytes": _bytes([page for page in set_aside if page.source == name])
            - _bytes(parts["-heldout"]),
        }
    record_file.write_text(json.dumps(record, indent=1))


def _row(page: Page) -> str:
    return json.dumps({"text": joined(page.lines), "id": page.id, "source": page.source}, ensure_ascii=False) + "\n"


def _bytes(pages: Iterable[Page]) -> int:
    return sum(len(joined(page.lines).encode()) for page in pages)


def _existing_training(folder: Path) -> Iterator[Page]:
    """The training documents of the sources that an earlier call wrote, read as lines without levels."""
    for path in sorted(folder.glob("*.jsonl")):
        if not path.stem.endswith("-heldout"):
            for text in _texts(path):
                yield Page("", path.stem, [Line(line, BODY) for line in text.split("\n")])


def say(message: str) -> None:
    """Print a message immediately."""
    print(f"fetch_curve_text: {message}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
