"""The HTML report: a self-contained page, unfinished runs, rendering in a browser, files that it replaces."""

import html
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from titan_cpt.reporting.run_log import read_run
from unit.reporting.run_folders import EN_DE, status_of, union_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_the_page_is_self_contained(write_run, capsys):
    """It has all numbers, versions and data fingerprints, and no URL of another file."""
    runs = [write_run("5_percent", EN_DE), union_of(write_run)]
    status = status_of("report", *runs, "--html")
    page = runs[0].parent / "report" / "index.html"
    text = page.read_text()
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", text)

    assert status == 0
    assert f"HTML page: {page}" in capsys.readouterr().out
    links = set(re.findall(r"""(?:src|href|srcset)=["'](?!data:|#)([^"']*)""", text))
    assert links == {"report.json", "losses.csv", "steps.csv"}
    assert all((page.parent / link).exists() for link in links)
    assert not re.findall(r"https?://", re.sub(r"base64,[A-Za-z0-9+/=]*", "", text))
    for number in ("5.1000", "3.2000", "4.1500", "+1.1000", "0.50x", "1.00x", "500 (5.0%)", "0.50", "torch 2.13.0"):
        assert number in cells
    assert "abc" in text
    assert {path.name for path in page.parent.glob("*.png")} == {
        "losses.png",
        "forgetting.png",
        "training.png",
        "trade-off.png",
        "learning-rates.png",
        "throughput.png",
    }


def test_a_metrics_file_without_a_plan_makes_a_page(write_run, tmp_path):
    """Without plan.json and config.toml: curves and losses, under the name of the folder."""
    run = write_run("only_metrics", EN_DE, plan=False)
    record = read_run(run / "metrics.jsonl")
    status = status_of("report", run / "metrics.jsonl", "--html", tmp_path / "out")
    text = (tmp_path / "out" / "index.html").read_text()

    assert (record.name, record.tokens.total, record.tokens_at("b", 5)) == ("only_metrics", 20_000, 15_000)
    assert status == 0
    assert "5.0000" in text
    assert "Validation losses" in text


def test_a_run_without_validation_makes_a_page(write_run, tmp_path):
    """As in the first minute of a run."""
    assert status_of("report", write_run("new", [], begun="a"), "--html", tmp_path / "out") == 0
    assert "still in a" in (tmp_path / "out" / "index.html").read_text()


def test_without_jinja2_the_message_says_what_to_install(write_run, tmp_path, monkeypatch, capsys):
    """Status 2; the tables are printed all the same."""
    monkeypatch.setitem(sys.modules, "jinja2", None)

    assert status_of("report", write_run("r", EN_DE), "--html", tmp_path / "out") == 2
    said = capsys.readouterr()
    assert "pip install 'titan_cpt[report]'" in said.err
    assert "stage b (10 steps" in said.out


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH (apt-get install chromium)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_page(write_run, tmp_path, scheme):
    """Headless Chromium finds every section, loads every figure, and uses the background of the color scheme."""
    runs = [write_run("5_percent", EN_DE), union_of(write_run)]
    status_of("report", *runs, "--html", tmp_path / "out")
    shot = tmp_path / "shot.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'c'}"]
    options += [
        "--blink-settings=preferredColorScheme=" + ("0" if scheme == "dark" else "1"),
        "--window-size=1280,3000",
    ]
    page = (tmp_path / "out" / "index.html").as_uri()
    checked = tmp_path / "out" / "checked.html"  # the same page, with a title that lists what it loaded
    script = (
        "<script>onload=()=>document.title=[...document.images].map(i=>i.complete&&i.naturalWidth>300)"
        ".concat(document.querySelectorAll('h2').length).join()</script></body>"
    )
    checked.write_text(Path(tmp_path / "out" / "index.html").read_text().replace("</body>", script))
    command = [str(BROWSER), *options]
    subprocess.run([*command, f"--screenshot={shot}", page], check=True, capture_output=True, timeout=120)
    dumped = subprocess.run([*command, "--dump-dom", checked.as_uri()], check=True, capture_output=True, timeout=120)
    painted = Image.open(shot).convert("L")
    corner = painted.getpixel((5, 5))

    assert b"<title>true,true,true,true,true,true,11</title>" in dumped.stdout
    assert corner > 240 if scheme == "light" else corner < 40
    assert len(painted.getcolors(maxcolors=256)) > 50


@pytest.mark.parametrize("what", ["page", "figure"])
def test_a_page_replaces_only_what_a_report_wrote(write_run, tmp_path, capsys, what):
    """Pages and figures of reports, those of older versions too (no mark in the PNGs), and no file of the user's."""
    run, out = write_run("r", EN_DE), tmp_path / "out"
    assert status_of("report", run, "--html", out) == 0
    figure = next(path for path in out.iterdir() if path.suffix == ".png")
    Image.open(figure).save(out / "old.png")  # without metadata
    shutil.move(out / "old.png", figure)
    assert status_of("report", run, "--html", out) == 0
    capsys.readouterr()

    path = out / ("index.html" if what == "page" else figure.name)
    for other in out.iterdir():
        other.unlink()
    path.write_text("mine")
    assert status_of("report", run, "--html", out) == 2
    assert f"{path}: was not written by `titan-cpt report`" in capsys.readouterr().err
    assert {other.name: other.read_text() for other in out.iterdir()} == {path.name: "mine"}


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH (apt-get install chromium)")
def test_the_page_is_never_wider_than_the_window(write_run, tmp_path):
    """On a phone, a tablet and a screen. Names are long; tables scroll in their boxes, figures change their form."""
    name = "a_very_long_name_of_a_run_" + "x" * 60
    runs = [
        write_run(f"{name}{n}", [line | {"dataset": f"{line['dataset']}_{name}"} for line in EN_DE]) for n in (1, 2)
    ]
    assert status_of("report", *runs, "--html", tmp_path / "out") == 0
    text = html.escape((tmp_path / "out" / "index.html").read_text())
    widths = (390, 800, 1400)  # of frames, because a window has at least 500 pixels
    frames = "".join(f'<iframe width={width} height=900 frameborder=0 srcdoc="{text}"></iframe>' for width in widths)
    pages = "[...document.querySelectorAll('iframe')].map(i=>i.contentDocument.documentElement)"
    script = f"<script>onload=()=>document.title={pages}.flatMap(p=>[p.clientWidth,p.scrollWidth])</script>"
    framed = tmp_path / "framed.html"
    framed.write_text(f"<title></title>{frames}{script}")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'c'}"]
    command = [str(BROWSER), *options, "--window-size=1600,1000", "--dump-dom", framed.as_uri()]
    dumped = subprocess.run(command, check=True, capture_output=True, timeout=120)

    assert dumped.stdout.decode().partition("</title>")[0].endswith("<title>390,390,800,800,1400,1400")
