"""A report as one HTML page that needs nothing else, and its figures as PNGs beside it.

The page is a list of sections, each made by a plain function of the runs' records; a new one is a line in `sections`.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_cpt.common.files import make_folder, write_bytes_atomically
from titan_cpt.common.reading import is_there, readable
from titan_cpt.common.run_folder import CONFIG_FILE, REPORT_FOLDER
from titan_cpt.errors import DataError, how_to_install
from titan_cpt.reporting.benchmark_table import benchmark_table, example_generations
from titan_cpt.reporting.comparison import ComparisonRow, compare, incomparable_datasets
from titan_cpt.reporting.run_log import RunLog, with_unique_names
from titan_cpt.reporting.summary import summarize_log

if TYPE_CHECKING:
    from titan_cpt.reporting.figures import Figure

PAGE_NAME = "index.html"
_PAGE_MARK = "· titan_cpt report</title>".encode()  # in the template, by which a page of ours is recognized
_TEMPLATE = Path(__file__).with_name("html_page.html")


@dataclass(frozen=True)
class HtmlTable:
    """A table: its head, its rows of text, and the places of the lowest number of a column, which are set in bold."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()

    def is_number(self, column: int) -> bool:
        """Whether a column's cells are numbers, which are set flush right."""
        cells = [row[column] for row in self.rows if row[column]]
        return bool(cells) and all(cell[0] in "+-0123456789" for cell in cells)

    def without_empty(self) -> HtmlTable:
        """The same without columns that have no text at all: MFU on a CPU, for one."""
        kept = [place for place in range(len(self.head)) if any(row[place] for row in self.rows)]
        return HtmlTable([self.head[place] for place in kept], [[row[place] for place in kept] for row in self.rows])


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        lead: one or two sentences above everything else.
        details: (summary, text) of what is folded away, text as it stands.
    """

    title: str
    lead: str = ""
    figures: Sequence[Figure] = ()
    grids: Sequence[HtmlTable] = ()
    details: Sequence[tuple[str, str]] = ()


def write_page(records: Sequence[RunLog], out: Path) -> Path:
    """Write `out`/index.html and the PNGs of its figures; the page's path.

    Raises:
        DataError: jinja2 or matplotlib is not installed, or a file would be replaced that no report wrote.
    """
    try:
        import jinja2  # with matplotlib the extra `report`
    except ImportError as error:
        raise DataError(f"--html needs jinja2 and matplotlib ({error}); {how_to_install('jinja2')}") from None

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["data_uri"] = lambda svg: "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
    records = with_unique_names(records)
    made = list(sections(records))
    figures = {out / f"{figure.name}.png": figure.png for section in made for figure in section.figures}
    _require_own_page(out, figures)
    make_folder(out)
    for path, png in figures.items():
        write_bytes_atomically(path, png)
    title = records[0].name if len(records) == 1 else f"{len(records)} runs"
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(title=title, sections=made, runs=[_state(record) for record in records])
    write_bytes_atomically(out / PAGE_NAME, page.encode())
    return out / PAGE_NAME


def _require_own_page(out: Path, figures: Iterable[Path]) -> None:
    """Refuse a folder in which a file that no report wrote would be replaced.

    Raises:
        DataError: names every such file.
    """
    page = out / PAGE_NAME
    own_page = _PAGE_MARK in _content(page)
    foreign = [page] if is_there(page) and not own_page else []
    foreign += [path for path in figures if is_there(path) and not _is_own_figure(_content(path), own_page=own_page)]
    if foreign:
        raise DataError(
            f"{', '.join(map(str, foreign))}: {'was' if len(foreign) == 1 else 'were'} not written by `titan-cpt "
            "report`, which would replace it. Nothing was changed: give --html another folder"
        )


def _is_own_figure(content: bytes, *, own_page: bool) -> bool:
    """Whether a PNG has our mark, or none at all beside a page of ours, which an older version wrote."""
    from titan_cpt.reporting.figures import PNG_MARK  # matplotlib

    head = content[:1024]
    return PNG_MARK.encode() in head or (own_page and head.startswith(b"\x89PNG") and b"Software" not in head)


def _content(path: Path) -> bytes:
    """A file's bytes; none for a file that is absent, or a folder."""
    with suppress(FileNotFoundError, ValueError), readable(path):
        return path.read_bytes()
    return b""


def default_folder(runs: Sequence[Path]) -> Path:
    """`report` in the run's folder, or in the one that holds all of them."""
    folders = [run if run.is_dir() else run.parent for run in runs]
    common = folders[0] if len(folders) == 1 else Path(os.path.commonpath([folder.resolve() for folder in folders]))
    return common / REPORT_FOLDER


def sections(records: Sequence[RunLog]) -> Iterator[Section]:
    """The parts of the page, in order."""
    rows = compare(records)
    yield from final_losses(rows)
    yield from loss_curves(records)
    yield from trade_off_section(rows, records)
    yield from schedules(records)
    yield from benchmarks(records)
    yield from data(records)
    yield from speed(records)
    yield from what_was_run(records)


def final_losses(rows: Sequence[ComparisonRow]) -> Iterator[Section]:
    """The table of every run's last losses."""
    datasets = sorted({name for row in rows for name in row.losses})
    head = ["run", *datasets, "AVG", "forgetting", "adaptation", "tokens", "compute of the last stage"]
    numbers = []
    for row in rows:
        adaptation = row.adaptation if row.forgetting else None  # from scratch everything is new
        numbers.append([*(row.losses.get(name) for name in datasets), row.average, row.mean_forgetting, adaptation])
    body = []
    for row, line in zip(rows, numbers, strict=True):
        losses = [_shown(value, sign=place == len(datasets) + 1) for place, value in enumerate(line)]
        compute = f"{row.update_share:.2f}x" + ("" if row.is_done else f", still in {row.stage}")
        body.append([row.name, *losses, _count(row.tokens), compute])
    best = set()
    different = incomparable_datasets(rows)
    for column in range(len(head) - 3):
        if different and head[column + 1] in (*different, "AVG"):
            continue  # no best among numbers that are not comparable
        known = [(line[column], place) for place, line in enumerate(numbers) if line[column] is not None]
        if len(known) > 1:
            best.add((min((value, place) for value, place in known if value is not None)[1], column + 1))
    yield Section(
        "Final losses",
        "Nats per token on held-out text at the end of the last stage, as the mean of its final window where there is "
        "one. AVG is the plain mean over the datasets trained on. Compute is that of the last stage against training "
        "again on everything; the lowest number of a column is bold."
        + (f" Not comparable, as validation data or windows differ: {', '.join(different)}." if different else ""),
        grids=[HtmlTable(head, body, frozenset(best))],
    )


def loss_curves(records: Sequence[RunLog]) -> Iterator[Section]:
    """Loss of every dataset over tokens."""
    if any(record.validations for record in records):
        from titan_cpt.reporting.figures import plot_losses, render_figure

        caption = (
            "Held-out loss of each dataset over the tokens trained on; dashed: where a stage ends; dotted: where its "
            "validation data or windows changed, from where on losses are not comparable with earlier ones."
        )
        yield Section(
            "What was learnt and forgotten",
            figures=[render_figure("losses", caption, lambda: plot_losses(records))],
        )


def trade_off_section(rows: Sequence[ComparisonRow], records: Sequence[RunLog]) -> Iterator[Section]:
    """Forgetting against adaptation; a run from scratch is set against what the others had before."""
    before: dict[tuple[str, str | None], list[float]] = {}
    for record in records:
        for stage in summarize_log(record)["stages"]:
            for name, value in stage["left_at"].items():
                before.setdefault((name, stage["validation_ids"][name]), []).append(value)
    old = {name for name, _ in before}
    points: list[tuple[int, ComparisonRow, float]] = []
    new = {name for record in records for name in record.plan["stages"][-1]["new_datasets"] if name not in old}
    for number, row in enumerate(rows):
        against = [
            row.losses[name] - sum(b) / len(b)
            for (name, identity), b in before.items()
            if name in row.losses and row.validation_ids.get(name) == identity
        ]
        value = row.mean_forgetting if row.forgetting else sum(against) / len(against) if against else None
        mine = [row.losses[name] for name in new if name in row.losses]
        if value is not None and row.adaptation is not None and mine:
            point = row if row.forgetting else replace(row, adaptation=sum(mine) / len(mine))
            points.append((number, point, value))
    if len(points) > 1:
        from titan_cpt.reporting.figures import plot_trade_off, render_figure

        caption = "A point for each run, better to the lower left. Hollow: from scratch, against the others' start."
        drawn = render_figure("trade-off", caption, lambda: plot_trade_off(points))
        yield Section("Forgetting against adaptation", figures=[drawn])


def schedules(records: Sequence[RunLog]) -> Iterator[Section]:
    """The LR as it was used."""
    if any(record.trains for record in records):
        from titan_cpt.reporting.figures import plot_learning_rates, render_figure

        drawn = render_figure(
            "learning-rates", "Learning rate of every step, as used.", lambda: plot_learning_rates(records)
        )
        yield Section("Learning rates", figures=[drawn])


def benchmarks(records: Sequence[RunLog]) -> Iterator[Section]:
    """What `titan-cpt eval` and [evaluation] found out, run by run, and what became of the example prompts."""
    for record in records:
        title = "Benchmarks" if len(records) == 1 else f"Benchmarks of {record.name}"
        unread: list[str] = []
        table, texts = benchmark_table(record, unread.append), example_generations(record, unread.append)
        if table is not None or texts or unread:
            yield Section(
                title,
                "Scores with their standard errors. A change is told sample by sample where the same samples were "
                "asked; p is how likely one as large is by chance. Below, what each stage makes of the same prompts."
                + "".join(f" Left out: {problem}." for problem in unread),
                grids=[] if table is None else [HtmlTable(table.head, table.rows)],
                details=texts,
            )


def data(records: Sequence[RunLog]) -> Iterator[Section]:
    """Tokens, replay and epochs of every dataset in every stage."""
    rows = []
    for record in records:
        states = {stage["name"]: _progress(stage) for stage in summarize_log(record)["stages"]}
        for stage in record.plan["stages"]:
            for name, use in stage["datasets"].items():
                share = use["replayed_tokens"] / stage["tokens"]
                epochs = "not known" if use["epochs"] is None else f"{use['epochs']:.2f}"
                replay = f"{_count(use['replayed_tokens'])} ({share:.1%})" if use["replayed_tokens"] else ""
                rows.append(
                    [record.name, stage["name"], name, _count(use["tokens"]), replay, epochs, states[stage["name"]]]
                )
    if rows:
        yield Section(
            "Data",
            "What each stage takes of each dataset by its plan, replay included; epochs are of the stage. The last "
            "column says how much of the stage was trained.",
            grids=[HtmlTable(["run", "stage", "dataset", "tokens", "of them replayed", "epochs", "trained"], rows)],
        )


def speed(records: Sequence[RunLog]) -> Iterator[Section]:
    """Throughput."""
    if any(line.get("tokens_per_s") for record in records for line in record.trains):
        from titan_cpt.reporting.figures import plot_throughput, render_figure

        rows = []
        for record in records:
            stages = summarize_log(record)["stages"]
            seconds, timed, done = (
                sum(stage[key] for stage in stages) for key in ("seconds", "timed_steps", "steps_done")
            )
            tokens = timed * record.plan["step_tokens"]
            mfus = [line["mfu"] for line in record.trains if line.get("mfu")]
            memory = max((line["memory_gib"] for line in record.trains if line.get("memory_gib")), default=None)
            cells = [f"{timed:,} of {done:,}", f"{seconds:,.0f}", f"{tokens / seconds:,.0f}" if seconds else ""]
            cells += [f"{sum(mfus) / len(mfus):.1%}" if mfus else "", "" if memory is None else f"{memory:.2f}"]
            rows.append([record.name, *cells])
        drawn = render_figure("throughput", "Validation and saving are left out.", lambda: plot_throughput(records))
        head = ["run", "recorded steps", "seconds of these steps", "tokens per second", "MFU", "memory, GiB"]
        grid = HtmlTable(head, rows).without_empty()
        yield Section("Throughput", figures=[drawn], grids=[grid])


def what_was_run(records: Sequence[RunLog]) -> Iterator[Section]:
    """Plan, versions, data and config of every run."""
    rows, details = [], []
    for record in records:
        start: Mapping[str, Any] = next((event for event in reversed(record.events) if event["name"] == "start"), {})
        versions = ", ".join(f"{name} {value}" for name, value in start.get("versions", {}).items())
        rows.append([record.name, str(record.plan["fingerprint"]), str(start.get("world_size", "")), versions])
        told = "".join(f"{name:<40} {value}\n" for name, value in start.get("data", {}).items())
        if told:
            details.append((f"{record.name}: fingerprints of the data", told))
        config = record.folder / CONFIG_FILE
        if config.exists():
            text = config.read_text(encoding="utf-8", errors="replace")
            details.append((f"{record.name}: config, every default spelt out", text))
    yield Section("What was run", grids=[HtmlTable(["run", "plan", "ranks", "versions"], rows)], details=details)


def _state(record: RunLog) -> str:
    stages = summarize_log(record)["stages"]
    done, steps = (sum(stage[key] for stage in stages) for key in ("steps_done", "steps"))
    return "; ".join([f"{record.name}: {done:,} of {steps:,} steps", *record.problems])


def _progress(stage: Mapping[str, Any]) -> str:
    """How much of a stage was trained."""
    if not stage["is_begun"]:
        return "not begun"
    done, steps = stage["steps_done"], stage["steps"]
    return "whole" if done >= steps else f"{done:,} of {steps:,} steps"


def _shown(value: float | None, *, sign: bool) -> str:
    return "" if value is None else f"{value:+.4f}" if sign else f"{value:.4f}"


def _count(tokens: int) -> str:
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if tokens >= size:
            return f"{tokens / size:.4g}{unit}"
    return str(tokens)
