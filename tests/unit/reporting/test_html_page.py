"""The HTML report: comparison rows computed by hand, a self-contained page, unfinished runs, rendering in a browser."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from titan_cpt.cli import main
from titan_cpt.reporting.comparison import ComparisonRow, compare, incomparable_datasets, print_comparison
from titan_cpt.reporting.figures import plot_losses, plot_trade_off
from titan_cpt.reporting.html_page import default_folder
from titan_cpt.reporting.run_log import read_run, with_unique_names
from titan_cpt.reporting.sections import sections

STEP_TOKENS = 1000
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def use(tokens, replayed=0, epochs=None):
    return {"tokens": tokens, "replayed_tokens": replayed, "epochs": epochs}


def stage(name, steps, new, union_steps, window=(), **datasets):
    return {
        "name": name,
        "steps": steps,
        "tokens": steps * STEP_TOKENS,
        "union_tokens": union_steps * STEP_TOKENS,
        "new_datasets": new,
        "datasets": datasets,
        "final_window": list(window),
    }


def measured(of, step, dataset, loss, forgetting=None):
    return {
        "kind": "validation",
        "stage": of,
        "step": step,
        "dataset": dataset,
        "loss_nats_per_token": loss,
        "bits_per_byte": loss / 2,
        "forgetting_nats_per_token": forgetting,
    }


def trained(of, step, run_step, lr):
    numbers = {"loss_nats_per_token": 3.0, "grad_norm": 1.0, "tokens_per_s": 500.0, "mfu": 0.5, "memory_gib": 0.25}
    place = {"stage": of, "step": step, "run_step": run_step, "tokens": run_step * STEP_TOKENS}
    return {"kind": "train", **place, "lr": lr, **numbers}


EN_DE = [
    measured("a", 0, "en", 8.0),
    measured("a", 0, "de", 8.5),
    measured("a", 10, "en", 4.0),
    measured("a", 10, "de", 7.0),
    measured("b", 0, "en", 4.0, 0.0),
    measured("b", 0, "de", 7.0),
    measured("b", 9, "en", 5.2, 1.2),
    measured("b", 9, "de", 3.4),
    measured("b", 10, "en", 5.0, 1.0),
    measured("b", 10, "de", 3.0),
]


@pytest.fixture
def write_run(tmp_path):
    """write_run(name, lines, stages) writes a run folder: by default 10 steps of English, then 10 of German."""

    def write_run(name, lines, stages=None, *, plan=True, begun="ab"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        stages = stages or [
            stage("a", 10, ["en"], 10, en=use(10_000, epochs=0.5)),
            stage("b", 10, ["de"], 20, window=(9, 10), en=use(500, 500), de=use(9500)),
        ]
        if plan:
            plan_json = {"name": folder.name, "fingerprint": "f00dcafe", "step_tokens": STEP_TOKENS, "stages": stages}
            (folder / "plan.json").write_text(json.dumps(plan_json))
        steps = [trained(of, step, step + 10 * (of == "b"), 1e-3) for of in begun for step in range(1, 11)]
        start = {"kind": "event", "name": "start", "versions": {"torch": "2.13.0"}, "data": {"datasets.en": "abc"}}
        text = "".join(json.dumps(line) + "\n" for line in [start | {"world_size": 2}, *steps, *lines])
        (folder / "metrics.jsonl").write_text(text)
        return folder

    return write_run


def union_of(write_run):
    stages = [stage("all", 20, ["en", "de"], 20, en=use(10_000), de=use(10_000))]
    lines = [measured("all", 0, "en", 8.0), measured("all", 20, "en", 4.2), measured("all", 20, "de", 3.2)]
    return write_run("union", lines, stages)


def status_of(*words):
    with pytest.raises(SystemExit) as leaving:
        main([str(word) for word in words])
    return leaving.value.code


def test_a_row_has_the_means_of_the_final_window(write_run):
    """By hand: means over steps 9 and 10, 5.1 and 3.2; AVG 4.15; forgetting 5.1 - 4.0; half of the union's compute."""
    (row,) = compare([read_run(write_run("r", EN_DE))])

    assert row.losses == pytest.approx({"en": 5.1, "de": 3.2})
    assert row.average == pytest.approx(4.15)
    assert row.mean_forgetting == pytest.approx(1.1)
    assert row.adaptation == pytest.approx(3.2)
    assert (row.update_share, row.is_done, row.tokens) == (0.5, True, 20_000)


def test_a_row_of_an_unfinished_run_names_its_stage(write_run):
    """With the last validation so far; without losses before the first one.

    A run with all steps but without its last validation is not done; a run that has no validation is.
    """
    going = read_run(write_run("going", EN_DE[:6]))
    blind = read_run(write_run("blind", []))
    new = read_run(write_run("new", [], begun="a"))
    row, unmeasured, empty = compare([going, blind, new])

    assert (row.stage, row.is_done, row.losses, row.tokens) == ("b", False, {"en": 4.0, "de": 7.0}, 20_000)
    assert (empty.losses, empty.average, empty.mean_forgetting, empty.is_done) == ({}, None, None, False)
    assert (empty.stage, empty.tokens) == ("a", 10_000)
    assert (unmeasured.losses, unmeasured.is_done) == ({}, True)


def test_an_average_is_over_the_datasets_trained_on(write_run):
    """The loss of a dataset that no stage trains on is shown and not averaged."""
    lines = [*EN_DE, measured("b", 10, "fr", 100.0)]
    (row,) = compare([read_run(write_run("r", lines))])

    assert row.losses["fr"] == 100.0
    assert row.average == pytest.approx(4.15)


def test_the_page_is_self_contained(write_run, capsys):
    """It has all numbers, versions and data fingerprints, and no URL of another file."""
    runs = [write_run("5_percent", EN_DE), union_of(write_run)]
    status = status_of("report", *runs, "--html")
    page = runs[0].parent / "report" / "index.html"
    text = page.read_text()
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", text)

    assert status == 0
    assert f"HTML page: {page}" in capsys.readouterr().out
    assert not re.findall(r"""(?:src|href|srcset)=["'](?!data:|#)""", text)
    assert not re.findall(r"https?://", re.sub(r"base64,[A-Za-z0-9+/=]*", "", text))
    for number in ("5.1000", "3.2000", "4.1500", "+1.1000", "0.50x", "1.00x", "500 (5.0%)", "0.50", "torch 2.13.0"):
        assert number in cells
    assert "abc" in text
    assert {path.name for path in page.parent.glob("*.png")} == {
        "losses.png",
        "trade-off.png",
        "learning-rates.png",
        "throughput.png",
    }


def test_the_lowest_number_of_each_column_is_bold(write_run):
    """Of en 5.1 and 4.2 the second; of AVG 4.15 and 3.7 the second; a column with one number has no best."""
    records = [read_run(write_run("5_percent", EN_DE)), read_run(union_of(write_run))]
    (table,) = next(iter(sections(records))).tables
    places = {(table.head[column], row) for row, column in table.best}

    assert {("en", 1), ("AVG", 1)} <= places
    assert "forgetting" not in {name for name, _ in places}


def test_a_run_from_scratch_is_compared_with_the_losses_of_the_others(write_run):
    """The union's 4.2 on English is 0.2 above the 4.0 of the other run at the end of its English stage."""
    records = [read_run(write_run("5_percent", EN_DE)), read_run(union_of(write_run))]
    drawn = {figure.name: figure for section in sections(records) for figure in section.figures}

    assert Image.open(io.BytesIO(drawn["trade-off"].png)).width > 600
    assert drawn["losses"].svg_light != drawn["losses"].svg_dark


def test_a_metrics_file_without_a_plan_makes_a_page(write_run, tmp_path):
    """Without plan.json and config.toml: curves and losses, under the name of the folder."""
    run = write_run("only_metrics", EN_DE, plan=False)
    record = read_run(run / "metrics.jsonl")
    status = status_of("report", run / "metrics.jsonl", "--html", tmp_path / "out")
    text = (tmp_path / "out" / "index.html").read_text()

    assert (record.name, record.total_tokens, record.tokens_at("b", 5)) == ("only_metrics", 20_000, 15_000)
    assert status == 0
    assert "5.0000" in text
    assert "Validation losses" in text


def test_a_run_without_validation_makes_a_page(write_run, tmp_path):
    """As in the first minute of a run."""
    assert status_of("report", write_run("new", [], begun="a"), "--html", tmp_path / "out") == 0
    assert "still in a" in (tmp_path / "out" / "index.html").read_text()


def test_runs_get_unique_names(write_run):
    """By their parent folder; runs of one folder keep their names, copies of a run get those of their folders."""
    apart = with_unique_names([read_run(write_run("x/seed-0", EN_DE)), read_run(write_run("y/seed-0", EN_DE))])
    together = with_unique_names([read_run(write_run("z/one", EN_DE)), read_run(write_run("z/two", EN_DE))])

    copy = shutil.copytree(together[0].folder, together[0].folder.parent / "one-backup")
    copies = with_unique_names([together[0], read_run(copy)])

    assert [record.name for record in copies] == ["one", "one-backup"]
    assert [record.name for record in with_unique_names([*copies, read_run(apart[0].folder)])] == [
        "z/one",
        "z/one-backup",
        "x/seed-0",
    ]
    assert [record.name for record in apart] == ["x/seed-0", "y/seed-0"]
    assert [record.name for record in together] == ["one", "two"]
    assert default_folder([apart[0].folder, apart[1].folder]).parent == apart[0].folder.resolve().parents[1]
    assert default_folder([apart[0].folder]) == apart[0].folder / "report"


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

    assert b"<title>true,true,true,true,7</title>" in dumped.stdout
    assert corner > 240 if scheme == "light" else corner < 40
    assert len(painted.getcolors(maxcolors=256)) > 50


def on(identity, lines):
    """The lines with that validation_id."""
    return [line | {"validation_id": identity} for line in lines]


def test_runs_with_different_validation_data_are_not_compared(write_run):
    """No bold number, a sentence that says so, and no point in the trade-off figure."""
    one, other = read_run(write_run("one", on("A", EN_DE))), union_of(write_run)
    (other / "metrics.jsonl").write_text(
        (other / "metrics.jsonl").read_text().replace('"dataset"', '"validation_id": "B", "dataset"')
    )
    records = [one, read_run(other)]
    console = Console(width=140, record=True, file=io.StringIO())
    print_comparison(compare(records), console)
    (table,) = (final := next(iter(sections(records)))).tables

    assert incomparable_datasets(compare(records)) == ["de", "en"]
    assert not {table.head[column] for _, column in table.best} & {"en", "de", "AVG"}
    assert "de, en" in final.lead
    assert "not comparable, measured on different validation data or windows: de, en" in console.export_text()
    assert "trade-off" not in {figure.name for section in sections(records) for figure in section.figures}


def test_a_curve_is_broken_and_marked_where_the_validation_data_changed(write_run):
    """English after 10 thousand tokens: two separate lines and a dotted one between; German is one line."""
    lines = [*on("A", EN_DE[:4]), *(line for line in on("A", EN_DE[4:]) if line["dataset"] == "de")]
    lines += [line for line in on("B", EN_DE[4:]) if line["dataset"] == "en"]
    german, english = plot_losses([read_run(write_run("r", lines))]).axes[:2]

    def curves(axes):
        return [
            list(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) > 1 and max(line.get_ydata()) > 1
        ]

    assert curves(english) == [[0, 10], [10, 19, 20]]
    assert curves(german) == [[0, 10, 10, 19, 20]]
    assert [line.get_linestyle() for line in english.lines].count(":") == 1
    assert ":" not in {line.get_linestyle() for line in german.lines}


def test_no_two_points_of_the_trade_off_look_alike():
    """Seven colors, four markers; a run from scratch is hollow."""
    rows = [
        ComparisonRow(f"run {n}", "s", True, {}, None, {"en": 0.1} if n else {}, 3.0 + n, 1, 1.0) for n in range(28)
    ]
    points = plot_trade_off([(number, row, 0.1) for number, row in enumerate(rows)]).axes[0].lines

    assert len({(point.get_color(), point.get_marker()) for point in points}) == 28
    assert [point.get_markerfacecolor() == "none" for point in points] == [True] + [False] * 27


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
