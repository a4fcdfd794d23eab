"""Fetch the reproduction's text: English and German novels, 1840 to 1920; whole novels are set aside for validation.

    python scripts/reproduce/fetch_novels.py data/reproduce                       # ELTeC from GitHub, 200 MB
    python scripts/reproduce/fetch_novels.py data/reproduce --archive FILE        # from a local archive

The European Literary Text Collection (COST-ELTeC, CC BY 4.0; its texts are in the public domain) has a hundred novels
of each language as TEI. An archive contains such TEI files, or jsonl files made from them: names that begin with
`english` or `german`, validation files with `heldout` in the name. Writes english.jsonl, german.jsonl,
english-heldout.jsonl and german-heldout.jsonl, one document of about 20,000 characters a line: {"text", "id"}.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
import sys
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Iterable, Iterator
from http.client import HTTPException
from pathlib import Path
from xml.etree import ElementTree

REPOSITORIES = {"english": "ELTeC-eng", "german": "ELTeC-deu"}
_ADDRESS = "https://github.com/COST-ELTeC/{name}/archive/refs/heads/master.tar.gz"
_TEI = "{http://www.tei-c.org/ns/1.0}"
_BLOCKS = {_TEI + name for name in ("head", "p", "l")}  # headings, paragraphs, lines of verse
_DOCUMENT_CHARACTERS = 20_000
_NOVELS_PER_VALIDATION_NOVEL = 20


class FetchError(Exception):
    """The text is not available; the message says why."""


def main() -> int:
    """Write the four files, unless they exist."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--archive", type=Path, help="a tar archive of TEI or jsonl files, instead of the network")
    options = parser.parse_args()
    wanted = [options.folder / f"{name}{part}.jsonl" for name in REPOSITORIES for part in ("", "-heldout")]
    if all(path.exists() for path in wanted):
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    try:
        if options.archive is not None:
            from_archive(options.archive, options.folder)
        else:
            from_github(options.folder)
    except (FetchError, OSError, HTTPException, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError) as error:
        print(f"fetch_novels: {error or 'the archive is truncated'}; nothing was written", file=sys.stderr)
        return 2
    return 0


def from_github(folder: Path) -> None:
    """Download both collections in their current state."""
    for language, name in REPOSITORIES.items():
        address = _ADDRESS.format(name=name)
        print(f"fetch_novels: {address}", flush=True)
        with tempfile.TemporaryFile() as file, urllib.request.urlopen(address, timeout=60) as response:
            while block := response.read(1 << 20):
                file.write(block)
            file.seek(0)
            with tarfile.open(fileobj=file) as archive:
                write(language, novels_of(archive), folder)


def from_archive(path: Path, folder: Path) -> None:
    """Copy the jsonl files of an archive; if a language has none, read its TEI files.

    Raises:
        FetchError: the archive contains neither.
    """
    with tarfile.open(path) as archive:
        found = {member.name.rpartition("/")[2]: member for member in archive.getmembers() if member.isfile()}
        for language in REPOSITORIES:
            lines = [name for name in found if name.startswith(language) and name.endswith(".jsonl")]
            for name in lines:
                part = "-heldout" if "heldout" in name else ""
                content = archive.extractfile(found[name])
                assert content is not None, "it is a file"
                if not (folder / f"{language}{part}.jsonl").exists():
                    (folder / f"{language}{part}.jsonl").write_bytes(content.read())
            if not lines:
                code = REPOSITORIES[language].partition("-")[2].upper()
                write(language, novels_of(archive, starting_with=code), folder)


def novels_of(archive: tarfile.TarFile, starting_with: str = "") -> Iterator[tuple[str, str]]:
    """(name, text) of every TEI file of a collection's level 1, sorted by name; only visible text."""
    for member in sorted(archive.getmembers(), key=lambda member: member.name):
        folder, _, name = member.name.rpartition("/")
        if member.isfile() and folder.endswith("level1") and name.startswith(starting_with) and name.endswith(".xml"):
            content = archive.extractfile(member)
            assert content is not None, "it is a file"
            yield name.removesuffix(".xml"), text_of(content.read())


def text_of(tei: bytes) -> str:
    """The body of a TEI file as paragraphs, without notes, page breaks and the header."""
    body = ElementTree.fromstring(tei).find(f"{_TEI}text/{_TEI}body")
    if body is None:
        raise FetchError("a TEI file without a body")
    texts = (" ".join("".join(_visible(block)).split()) for block in _blocks(body))
    return "\n\n".join(text for text in texts if text)


def _blocks(element: ElementTree.Element) -> Iterator[ElementTree.Element]:
    """Blocks in text order; an element without blocks, such as a one-line quotation, is a block itself."""
    for child in element:
        if child.tag == _TEI + "note":
            continue
        if child.tag not in _BLOCKS and any(inner.tag in _BLOCKS for inner in child.iter()):
            yield from _blocks(child)
        else:
            yield child


def _visible(element: ElementTree.Element) -> Iterator[str]:
    yield element.text or ""
    for child in element:
        if child.tag != _TEI + "note":
            yield from _visible(child)
        yield child.tail or ""


def write(language: str, novels: Iterable[tuple[str, str]], folder: Path) -> None:
    """Write both files of a language, or neither; the hash of a novel's name decides whether it is for validation.

    Raises:
        FetchError: there is no novel.
    """
    counts = [0, 0]
    parts = [folder / f"{language}.jsonl", folder / f"{language}-heldout.jsonl"]
    unfinished = [part.with_name(f".{part.name}.{os.getpid()}.tmp") for part in parts]
    try:
        with unfinished[0].open("w") as training, unfinished[1].open("w") as validation:
            for name, text in novels:
                is_validation = int(hashlib.sha256(name.encode()).hexdigest(), 16) % _NOVELS_PER_VALIDATION_NOVEL == 0
                counts[is_validation] += 1
                for number, piece in enumerate(pieces(text)):
                    line = json.dumps({"text": piece, "id": f"{name}@{number:03d}"}, ensure_ascii=False)
                    (validation if is_validation else training).write(line + "\n")
        if not all(counts):
            raise FetchError(
                f"{language}: found {counts[0]} novels for training and {counts[1]} for validation, needs both"
            )
        for before, part in zip(unfinished, parts, strict=True):
            if not part.exists():  # an existing file stays: only the other one was missing
                before.replace(part)
    finally:
        for path in unfinished:
            path.unlink(missing_ok=True)
    print(f"fetch_novels: {language}: {counts[0]} novels for training, {counts[1]} for validation", flush=True)


def pieces(text: str) -> Iterator[str]:
    """Split a novel between paragraphs into documents of about 20,000 characters."""
    piece: list[str] = []
    length = 0
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        length += len(paragraph) + 2
        if length >= _DOCUMENT_CHARACTERS:
            yield "\n\n".join(piece)
            piece, length = [], 0
    if piece:
        yield "\n\n".join(piece)


if __name__ == "__main__":
    sys.exit(main())
