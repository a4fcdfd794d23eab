"""Hooks of mkdocs.yml: the site has a page for every file outside of docs/ that a page links to.

README.md, CONTRIBUTING.md and CHANGELOG.md become pages of their own, and each other linked file or folder a page below
source/ that shows its text or its list of files. So every link works on the site, also without a network.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES_OF_ROOT = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LANGUAGES = {".py": "python", ".toml": "toml", ".sh": "bash", ".sbatch": "bash", ".json": "json"}
COMMENT = re.compile(
    r"^ *<!--(?:(?!-->).)*-->\n", re.DOTALL | re.MULTILINE
)  # in a list it would end a code block's item
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each linked file outside of docs/, and for the pages of the repository's root."""
    for name, uri in PAGES_OF_ROOT.items():
        files.append(File.generated(config, uri, content=(ROOT / name).read_text(encoding="utf-8")))
    linked = {
        target
        for file in files.documentation_pages()
        for _, link in LINK.findall(file.content_string)
        if site_uri(target := repository_path(file.src_uri, link)).startswith("source/")
    }
    while linked:
        path = linked.pop()
        if files.get_file_from_path(site_uri(path)) is None and (ROOT / path).exists():
            files.append(File.generated(config, site_uri(path), content=source_page(path)))
            if (ROOT / path).is_dir():
                linked |= {f"{path}/{name}" for name in listed(path)}
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to repository files at their pages of the site, and remove comments."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown

    def moved(link: re.Match[str]) -> str:
        target = site_uri(repository_path(uri, link[2]))
        return link[1] + posixpath.relpath(target, posixpath.dirname(uri) or ".")

    return LINK.sub(moved, COMMENT.sub("", markdown))


def repository_path(uri: str, link: str) -> str:
    """The path in the repository that a link of a page means."""
    of_root = {page: name for name, page in PAGES_OF_ROOT.items()}
    return posixpath.normpath(posixpath.join(posixpath.dirname(of_root.get(uri, f"docs/{uri}")), link))


def site_uri(path: str) -> str:
    """The page or file of the site, relative to docs/, that shows a path of the repository."""
    if path in PAGES_OF_ROOT:
        return PAGES_OF_ROOT[path]
    if path.startswith("docs/"):
        inside = path.removeprefix("docs/")
        return f"{inside}/README.md" if (ROOT / path).is_dir() else inside
    return f"source/{path}/index.md" if (ROOT / path).is_dir() else f"source/{path}.md"


def source_page(path: str) -> str:
    """The page of a file or folder outside of docs/; the search leaves it out."""
    head = f"---\nsearch: {{exclude: true}}\ntitle: {path}\n---\n# `{path}`\n\n"
    if (ROOT / path).is_dir():
        entries = [
            (name, f"{name}/index.md" if (ROOT / path / name).is_dir() else f"{name}.md") for name in listed(path)
        ]
        return head + "".join(f"- [`{name}`]({link})\n" for name, link in entries)
    text = (ROOT / path).read_text(encoding="utf-8")
    return f"{head}~~~~~~~~~~ {LANGUAGES.get(Path(path).suffix, 'text')}\n{text}\n~~~~~~~~~~\n"


def listed(path: str) -> list[str]:
    """The files and folders of a folder that its page lists."""
    return sorted(
        entry.name for entry in (ROOT / path).iterdir() if not entry.name.startswith((".", "__")) and is_text(entry)
    )


def is_text(entry: Path) -> bool:
    """Whether a file has a page: folders do, and the kinds of text in LANGUAGES."""
    return entry.is_dir() or entry.suffix in LANGUAGES
