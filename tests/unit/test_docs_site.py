"""The site of mkdocs.yml: it builds strictly, needs no other host, and shows pages as the repository's view does."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
OF_ROOT = {"readme.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
PAGES = {path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*.md"))} | {
    page: ROOT / name for page, name in OF_ROOT.items()
}
FETCHED = re.compile(r"<(?:link|script|img|iframe|source|video)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site. Links, anchors and pages that nav lacks are errors of the build."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def html_of(site, page):
    path = site / page.removesuffix(".md")
    return (path.parent / ("index" if path.name == "README" else path.name)).with_suffix(".html").read_text()


def test_no_page_of_the_site_fetches_anything_from_another_host(site):
    """Scripts, styles, fonts and images come from the site's own folder. The theme would
    fetch Mermaid for a diagram, so there is none."""
    pages = {path.relative_to(site): path.read_text() for path in site.rglob("*.html")}

    assert {path: found for path, text in pages.items() if (found := FETCHED.findall(text))} == {}
    assert [path for path, text in pages.items() if 'class="mermaid"' in text] == []
    assert [path for path in site.rglob("*.css") if re.search(r"url\([\"']?(?:https?:)?//", path.read_text())] == []


def test_the_site_can_be_searched_without_a_server(site):
    """The index is also a script, and every page loads what runs the search without a worker."""
    assert (site / "search" / "search_index.js").read_text().startswith("var __index =")
    assert "assets/iframe-worker.js" in html_of(site, "index.md")


@pytest.mark.parametrize("page", PAGES)
def test_the_site_shows_the_blocks_of_a_page_that_the_web_view_of_the_repository_shows(site, page):
    """The same numbers of headings, lists, tables and code blocks as CommonMark with tables has. The site's
    Markdown needs four spaces before what belongs to a list item."""
    text = re.sub(r"(?ms)^ *<!--(?:(?!-->).)*-->\n", "", PAGES[page].read_text(encoding="utf-8"))
    article = html_of(site, page).partition("<article")[2].partition("</article>")[0]

    assert blocks(article) == blocks(MarkdownIt("commonmark").enable("table").render(text))


def blocks(html):
    """How often each block element occurs."""
    html = re.sub(r"<pre.*?</pre>|<aside.*?</aside>", lambda found: found[0][:4] + ">", html, flags=re.DOTALL)
    return Counter(re.findall(r"<(h[1-6]|li|ul|ol|tr|pre|img)\b", html))
