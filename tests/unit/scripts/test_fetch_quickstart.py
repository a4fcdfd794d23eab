"""scripts/fetch_quickstart.py: from packages and articles to clean training and validation text. No network."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"

ENGLISH = "The file is saved to the folder that you have chosen, and it can be opened with any program."
GERMAN = "Die Datei wird in dem Ordner gespeichert, den Sie gewählt haben, und kann mit jedem Programm geöffnet werden."


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up, and the one script imports the other
    spec.loader.exec_module(module)
    return module


manual = _load("manual_text")
fetch = _load("fetch_quickstart")


def body(*texts: str) -> list:
    """Lines that are not headings."""
    return [manual.Line(text, manual.BODY) for text in texts]


def texts_of(lines: list) -> list[str]:
    return [line.text for line in lines]


class TestHtml:
    """The text that is read from an HTML page."""

    def test_paragraphs_items_and_headings_become_lines_of_their_own(self) -> None:
        """Inline markup joins, block markup divides, entities are read and spaces are single."""
        page = "<h1>Saving</h1><p>Choose <b>File</b>\n   &gt; Save as&nbsp;usual.</p><ul><li>One word each day</ul>"

        assert manual.html_lines(page) == [
            manual.Line("Saving", 1),
            manual.Line("Choose File > Save as usual.", manual.BODY),
            manual.Line("One word each day", manual.BODY),
        ]

    @pytest.mark.parametrize(
        "frame",
        [
            "<nav><p>To the next page of all</p></nav>",
            "<script>if (a < b) then we run this</script>",
            "<pre>Dim a As Integer and so on</pre>",
            '<div class="toc"><div><p>Chapter one of the book</p></div><p>and the chapter after it</p></div>',
            '<div class="big relatedtopics"><p>See also the other page</p></div>',
            "<table><tr><td>12</td><td>MB_OK</td></tr></table>",
            "<p>=SUM(A1:B2)+(3*4)/[5;6]</p>",
        ],
        ids=["nav", "script", "code", "nested contents", "one class of two", "bare cells", "formula"],
    )
    def test_navigation_code_and_bare_cells_are_omitted(self, frame: str) -> None:
        """Navigation, code and cells of a word leave no trace, and what follows them is still read."""
        lines = manual.html_lines(f"{frame}<p>This is the text itself.</p>")

        assert texts_of(lines) == ["This is the text itself."]

    def test_a_reader_sees_one_of_the_alternatives(self) -> None:
        """Of what LibreOffice writes for several systems or programs, the first that is not another system's stays."""
        page = (
            '<p>Press <span class="switchinline"><span class="MAC"><span>Command</span></span>'
            "<span><span>Ctrl</span></span></span>+S in a "
            '<span class="switchinline"><span class="WRITER">text</span><span class="CALC">table</span></span>'
            " to save.</p>"
        )

        assert texts_of(manual.html_lines(page)) == ["Press Ctrl+S in a text to save."]


class TestMallard:
    """The text that is read from a page of GNOME's help."""

    PAGE = """
        <page xmlns="http://projectmallard.org/1.0/" xmlns:if="http://projectmallard.org/if/1.0/" id="wifi">
          <info><desc>A description of the page here</desc><credit><name>Some One</name></credit></info>
          <title>Wireless</title>
          <comment><p>This is still to be written.</p></comment>
          <steps>
            <item><p>Press <keyseq><key>Ctrl</key><key>P</key></keyseq> and read <link xref="help#more"/>.</p></item>
          </steps>
          <if:choose>
            <if:when test="x"><p>On the other desktop only.</p></if:when>
            <p>On this very desktop.</p>
          </if:choose>
          <section id="more"><title>More</title><p>There is no more of it.</p></section>
        </page>"""

    def test_links_show_the_title_that_they_lead_to(self) -> None:
        """A link without words of its own is read as the title of its target, a section's too."""
        titles = manual.mallard_titles([self.PAGE.replace('id="wifi"', 'id="help"')])

        assert titles == {"help": "Wireless", "help#more": "More"}
        assert "Press Ctrl+P and read More." in texts_of(manual.mallard_lines(self.PAGE, titles))

    def test_only_what_a_reader_sees_is_text(self) -> None:
        """Credits, editors' notes and the wording for another desktop are omitted; titles keep their depth."""
        lines = manual.mallard_lines(self.PAGE)

        assert lines == [
            manual.Line("Wireless", 1),
            *body("Press Ctrl+P and read.", "On this very desktop."),
            manual.Line("More", 2),
            *body("There is no more of it."),
        ]


class TestLanguage:
    """Whether a text is in the language that its package claims."""

    @pytest.mark.parametrize(
        ("text", "language"),
        [(ENGLISH, "english"), (GERMAN, "german"), ("SELECT name, size WHERE size 17", None), ("", None)],
    )
    def test_the_commonest_words_identify_the_language(self, text: str, language: str | None) -> None:
        """English is English, German is German, and what has neither's words is neither."""
        assert manual.language_of(text) == language

    def test_an_untranslated_paragraph_is_dropped(self) -> None:
        """A German page keeps its German and its short lines, and loses its English paragraph."""
        page = body(GERMAN, ENGLISH, "Open Source", "Januar Februar März April Mai Juni Juli August", GERMAN)

        assert manual.in_language(page, "german") == [page[0], *page[2:]]

    def test_an_untranslated_page_is_dropped(self) -> None:
        """A page that is English on the whole gives a German corpus nothing, its one German line included."""
        page = body(ENGLISH, ENGLISH.replace("file", "table"), ENGLISH.replace("file", "page"), GERMAN)

        assert manual.in_language(page, "german") == []


def windows(line: str, size: int = 10) -> set[tuple[str, ...]]:
    """Every run of `size` words of a line of lower-case words."""
    words = line.split()
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


PARAGRAPHS = st.lists(st.sampled_from(["ab", "cd", "ef"]), min_size=1, max_size=30)


@st.composite
def overlapping_texts(draw: st.DrawFn) -> list[list[str]]:
    """Texts whose lines are cut from few paragraphs, so that they repeat each other in part or in whole."""
    pool = draw(st.lists(PARAGRAPHS, min_size=1, max_size=4))
    cut = st.tuples(st.sampled_from(pool), st.integers(0, 12), st.integers(1, 30))
    line = st.one_of(cut.map(lambda c: " ".join(c[0][c[1] : c[1] + c[2]]) or "ab"), PARAGRAPHS.map(" ".join))
    return draw(st.lists(st.lists(line, max_size=5), max_size=6))


class TestRepeats:
    """No text twice, and no text lost."""

    @given(overlapping_texts())
    def test_no_two_kept_texts_share_ten_words_in_a_row(self, texts: list[list[str]]) -> None:
        """Therefore splitting by document leaks no training text into validation."""
        kept = [texts_of(lines) for lines in manual.drop_repeats(body(*lines) for lines in texts)]

        assert len(kept) == len(texts)
        runs = [set().union(*map(windows, lines)) for lines in kept]
        assert all(runs[i].isdisjoint(runs[j]) for i in range(len(runs)) for j in range(i))

    @given(overlapping_texts())
    def test_nothing_is_dropped_without_need(self, texts: list[list[str]]) -> None:
        """The first text stays whole, and a second pass finds nothing more to drop."""
        once = list(manual.drop_repeats(body(*lines) for lines in texts))

        assert [texts_of(lines) for lines in once[:1]] == texts[:1]
        assert list(manual.drop_repeats(once)) == once

    def test_ten_words_are_a_repeat_and_nine_are_not(self) -> None:
        """The border of the rule, whatever the case and the punctuation."""
        ten = "one two three four five six seven eight nine ten"
        nine = ten.removesuffix(" ten")
        first, second = manual.drop_repeats(
            [body(f"zero {ten} eleven"), body(f"{ten.upper()}!", f"again {ten}", f"{nine} twelve")]
        )

        assert texts_of(first) == [f"zero {ten} eleven"]
        assert texts_of(second) == [f"{nine} twelve"]

    def test_a_short_line_repeats_as_a_whole_from_four_words_on(self) -> None:
        """Four words that were seen as a line are dropped, three may come again, and so may parts of longer lines."""
        _, second = manual.drop_repeats(
            [
                body("this is the rule", "see also here", "and this is the rule again"),
                body("This is the rule.", "see also here"),
            ]
        )

        assert texts_of(second) == ["see also here"]

    def test_a_text_may_repeat_itself(self) -> None:
        """Repeats inside one document stay in one part when documents are split into training and validation."""
        line = "one two three four five six seven eight nine ten"

        assert [texts_of(lines) for lines in manual.drop_repeats([body(line, line)])] == [[line, line]]


def test_headings_over_nothing_are_dropped() -> None:
    """A heading stays if text, or a heading of a lower rank that stays, comes before the next of its own rank."""
    chapter, section, example, text = (
        manual.Line("Chapter", 1),
        manual.Line("Section", 2),
        manual.Line("Example", 3),
        manual.Line("Some text.", manual.BODY),
    )

    assert manual.drop_empty_headings([chapter, section, example, text]) == [chapter, section, example, text]
    assert manual.drop_empty_headings([section, chapter, text, section, example, section, text, example]) == [
        chapter, text, section, text,
    ]  # fmt: skip


def test_cleaning_does_not_depend_on_the_order_of_the_pages() -> None:
    """Pages come out by source and id, and what was dropped adds up to what came in."""
    pages = [
        manual.Page("b", "manual", body(*(f"{ENGLISH} This is part {i} of it." for i in range(3)))),
        manual.Page("a", "manual", body(ENGLISH, "This page is about the use of the letter a, and of it only.")),
        manual.Page(
            "c", "manual", body(*(f"On page {i} you can read that this is for the user and by it." for i in "xyz"))
        ),
        manual.Page("d", "manual", body(GERMAN)),
    ]

    kept, dropped = manual.clean(pages, "english")

    assert (kept, dropped) == manual.clean(pages[::-1], "english")
    assert [page.id for page in kept] == ["a", "c"]
    kept_bytes = sum(len(manual.joined(page.lines).encode()) for page in kept)
    assert dropped.other_language_bytes == len(GERMAN.encode())
    assert dropped.repeated_bytes == len(manual.joined(pages[0].lines).encode())
    assert dropped.read_bytes == (
        kept_bytes + dropped.other_language_bytes + dropped.repeated_bytes + dropped.fragment_bytes
    )


def write_tool(folder: Path, name: str, script: str) -> None:
    tool = folder / name
    tool.write_text(f"#!/usr/bin/env bash\n{script}\n", encoding="utf-8")
    tool.chmod(0o755)


def write_package(path: Path, files: dict[str, str]) -> None:
    """A .deb for the stand-in of dpkg-deb: the tar archive that the real one would print."""
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content.encode())
            archive.addfile(info, io.BytesIO(content.encode()))
            link = tarfile.TarInfo(f"./{name.replace('support', 'a-link-to-it')}")
            link.type, link.linkname = tarfile.SYMTYPE, name.rpartition("/")[2]
            archive.addfile(link)


class TestPackages:
    """The first route, with stand-ins for apt's tools."""

    @pytest.fixture
    def apt(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Stand-ins for apt-get, apt-cache and dpkg-deb that serve the folder returned."""
        served, tools = tmp_path / "served", tmp_path / "tools"
        served.mkdir()
        tools.mkdir()
        monkeypatch.setenv("SERVED", str(served))
        monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
        write_tool(
            tools,
            "apt-get",
            """shift 3; [[ $1 == download ]] || exit 0; shift
            for name; do cp "$SERVED/$name.deb" "${name}_1%3a2_all.deb"; done""",
        )
        write_tool(
            tools,
            "apt-cache",
            """shift 5; for name; do  # the status is that of the last name, missing or not
            [[ -f $SERVED/$name.deb ]] && printf "Package: $name\\nSize: 12\\n\\n"; done""",
        )
        write_tool(tools, "dpkg-deb", 'cat "${!#}"')
        return served

    def test_pages_are_read_from_the_packages_that_there_are(self, apt: Path, tmp_path: Path) -> None:
        """A package that the sources lack is skipped; files that are not pages are not read."""
        write_package(
            apt / "debian-faq-de.deb",
            {
                "usr/share/doc/debian/FAQ/de/support.de.html": f"<p>{GERMAN}</p>",
                "usr/share/doc/debian/FAQ/de/index.de.html": "<p>This is the table of contents.</p>",
                "usr/share/doc/debian-faq-de/copyright": "This is free documentation.",
            },
        )
        page = '<page xmlns="http://projectmallard.org/1.0/" id="x"><p>{}</p></page>'
        write_package(
            apt / "gnome-user-docs.deb",
            {
                "usr/share/help/C/gnome-help/x.page": page.format(ENGLISH),
                "usr/share/help/de/gnome-help/x.page": page.format(GERMAN),
                "usr/share/help/fr/gnome-help/x.page": page.format("Voici un texte de quelques mots."),
            },
        )
        folder = tmp_path / "work"
        folder.mkdir()

        pages = fetch.debian_pages(folder)

        assert [(p.id, p.lines) for p in pages["english"]] == [
            ("gnome-user-docs/help/C/gnome-help/x.page", body(ENGLISH))
        ]
        assert [(p.source, p.lines) for p in pages["german"]] == [
            ("gnome-user-docs-german", body(GERMAN)),
            ("debian-faq-de", body(GERMAN)),
        ]

    def test_sources_without_the_packages_are_refused(self, apt: Path, tmp_path: Path) -> None:
        """Sources that offer none of the packages end this route with its reason."""
        folder = tmp_path / "work"
        folder.mkdir()

        with pytest.raises(fetch.FetchError, match="offer none of the documentation packages"):
            fetch.debian_pages(folder)

    def test_apts_own_words_are_the_reason(self, apt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A failed download is reported in the words that apt-get printed."""
        write_package(apt / "debian-faq.deb", {})
        write_tool(tmp_path / "tools", "apt-get", '[[ $4 == update ]] || { echo "E: no space left" >&2; exit 100; }')
        folder = tmp_path / "work"
        folder.mkdir()

        with pytest.raises(fetch.FetchError, match="apt-get download failed: E: no space left"):
            fetch.debian_pages(folder)

    def test_apts_state_stays_inside_the_folder(self, tmp_path: Path) -> None:
        """Every place that apt writes to is in the temporary folder, and hooks of the system are cleared."""
        config = fetch.write_apt_config(tmp_path).read_text(encoding="utf-8").splitlines()

        for place in ("Dir::State", "Dir::State::Lists", "Dir::State::Status", "Dir::Cache"):
            assert any(line.startswith(f'{place} "{tmp_path}/') for line in config), place
        assert "#clear APT::Update::Post-Invoke;" in config


class TestHub:
    """The second route, with a local folder for the hub."""

    @pytest.fixture
    def wikipedia(self, tmp_path: Path) -> Path:
        """A folder that `datasets` reads as it reads the hub's Wikipedia: a configuration per language."""
        folder = tmp_path / "wikipedia"
        folder.mkdir()
        configs = []
        for config, text in (("20231101.en", ENGLISH), ("20231101.de", GERMAN)):
            rows = [{"id": str(i), "text": f"{text}\n\nReferences\n\nThis is not read at all."} for i in range(5)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{config}.jsonl").write_text(lines, encoding="utf-8")
            configs.append(f"- config_name: {config}\n  data_files: {config}.jsonl\n")
        (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n", encoding="utf-8")
        return folder

    def test_the_first_articles_of_each_language_are_read(self, wikipedia: Path) -> None:
        """As many articles as requested, each up to its references."""
        pages = fetch.hub_pages(str(wikipedia), articles=3)

        assert [page.lines for page in pages["english"]] == [body(ENGLISH)] * 3
        assert [page.lines for page in pages["german"]] == [body(GERMAN)] * 3
        assert len({page.id for page in pages["english"] + pages["german"]}) == 6

    def test_a_dataset_that_cannot_be_read_is_named(self, tmp_path: Path) -> None:
        """Whatever the client raises becomes one sentence that names the dataset."""
        with pytest.raises(fetch.FetchError, match=r"20231101\.en could not be read"):
            fetch.hub_pages(str(tmp_path / "nothing_here"), articles=3)


class TestCommandLine:
    """What a user sees."""

    def test_existing_files_are_not_fetched_again(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """With both files in place it says so and leaves them as they are."""
        for name in ("english.jsonl", "german.jsonl"):
            (tmp_path / name).write_text("{}\n", encoding="utf-8")

        assert fetch.main(["--output", str(tmp_path)]) == 0
        assert "nothing to do" in capsys.readouterr().out
        assert (tmp_path / "german.jsonl").read_text(encoding="utf-8") == "{}\n"

    def test_without_a_route_it_ends_with_one_message(self, tmp_path: Path) -> None:
        """No apt and no hub: exit status 2, both reasons, what to do, no traceback, no half-written file."""
        environment = {
            "PATH": str(tmp_path / "empty"),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "hf"),
            "HOME": str(tmp_path),
        }
        output = tmp_path / "out"

        done = subprocess.run(
            [sys.executable, str(SCRIPTS / "fetch_quickstart.py"), "--output", str(output)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

        assert done.returncode == 2, done.stderr
        assert "Debian packages: needs apt-get and apt-cache and dpkg-deb" in done.stderr
        assert "the Hugging Face hub: wikimedia/wikipedia 20231101.en could not be read" in done.stderr
        assert f"{output}/german.jsonl" in done.stderr
        assert "Traceback" not in done.stderr
        assert not output.exists()

    def test_both_files_appear_whole(self, tmp_path: Path) -> None:
        """A document a line with its three keys in UTF-8, and no temporary file beside them."""
        pages = [manual.Page("id-1", "manual", body(GERMAN, "Zweite Zeile"))]
        dropped = manual.Dropped(1000, 0, 250, 0)

        fetch.write({"english": ([], dropped), "german": (pages, dropped)}, tmp_path / "new")

        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["english.jsonl", "german.jsonl"]
        (row,) = map(json.loads, (tmp_path / "new/german.jsonl").read_text(encoding="utf-8").splitlines())
        assert row == {"text": f"{GERMAN}\nZweite Zeile", "id": "id-1", "source": "manual"}
        assert "25.0 % repeats" in fetch.summary(tmp_path, pages, dropped)
