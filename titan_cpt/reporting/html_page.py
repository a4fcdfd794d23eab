"""A report as one self-contained HTML page, with its figures as PNG files and its data as JSON and CSV beside it."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from titan_cpt.common.files import make_folder, write_bytes_atomically
from titan_cpt.common.reading import is_there, readable
from titan_cpt.common.run_folder import REPORT_FOLDER
from titan_cpt.errors import DataError, how_to_install
from titan_cpt.reporting.comparison import compare
from titan_cpt.reporting.number_texts import date_text
from titan_cpt.reporting.page_data import MARK_LENGTH, data_files
from titan_cpt.reporting.run_log import RunLog, with_unique_names
from titan_cpt.reporting.sections import sections
from titan_cpt.reporting.sessions import sessions_of
from titan_cpt.reporting.summary import summarize_log
from titan_cpt.reporting.verdict import verdict

PAGE_NAME = "index.html"
_PAGE_MARK = "· titan_cpt report</title>".encode()  # in the template: marks pages that a report wrote
_TEMPLATE = Path(__file__).with_name("html_page.html")


def write_page(runs: Sequence[RunLog], out: Path) -> Path:
    """Write `out`/index.html, its figures (PNG) and the data behind them (JSON, CSV); returns the page's path.

    Raises:
        DataError: jinja2 or matplotlib is not installed, or a file that no report wrote would be replaced.
    """
    try:
        import jinja2  # with matplotlib the extra `report`
    except ImportError as error:
        raise DataError(f"--html needs jinja2 and matplotlib ({error}); {how_to_install('jinja2')}") from None

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["data_uri"] = lambda svg: "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
    environment.filters["address"] = lambda path: quote(os.path.relpath(path.resolve(), out.resolve()))
    runs = with_unique_names(runs)
    data = {out / name: text for name, text in data_files(runs).items()}
    _require_own_page(out, (), data)  # before the figures are drawn, which takes seconds
    make_folder(out)
    page_sections = list(sections(runs))
    figures = {out / f"{figure.name}.png": figure.png for section in page_sections for figure in section.figures}
    _require_own_page(out, figures, data)
    for path, png in figures.items():
        write_bytes_atomically(path, png)
    for path, text in data.items():
        write_bytes_atomically(path, text.encode())
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(
        title=title,
        verdict=verdict(runs, compare(runs)),
        sections=page_sections,
        runs=[_state(run) for run in runs],
        files=[path.name for path in data],
    )
    write_bytes_atomically(out / PAGE_NAME, page.encode())
    return out / PAGE_NAME


def _require_own_page(out: Path, figures: Iterable[Path], data: Mapping[Path, str]) -> None:
    """Check that a report would only replace files that a report wrote.

    Raises:
        DataError: lists every other file that would be replaced.
    """
    page = out / PAGE_NAME
    own_page = _PAGE_MARK in _content(page)
    foreign = [page] if is_there(page) and not own_page else []
    foreign += [path for path in figures if is_there(path) and not _is_own_figure(_content(path), own_page=own_page)]
    marks = {path: text[:MARK_LENGTH].encode() for path, text in data.items()}
    foreign += [path for path, mark in marks.items() if is_there(path) and not _content(path).startswith(mark)]
    if foreign:
        raise DataError(
            f"{', '.join(map(str, foreign))}: {'was' if len(foreign) == 1 else 'were'} not written by `titan-cpt "
            "report`, which would replace it. Nothing was changed: give --html another folder"
        )


def _is_own_figure(content: bytes, *, own_page: bool) -> bool:
    """Whether a report wrote a PNG: it has the mark, or no mark and is beside a report of an older version."""
    from titan_cpt.reporting.figures import PNG_MARK  # matplotlib

    head = content[:1024]
    return PNG_MARK.encode() in head or (own_page and head.startswith(b"\x89PNG") and b"Software" not in head)


def _content(path: Path) -> bytes:
    """A file's bytes; empty if it does not exist or is a folder."""
    with suppress(FileNotFoundError, ValueError), readable(path):
        return path.read_bytes()
    return b""


def default_folder(runs: Sequence[Path]) -> Path:
    """`report` in the run folder; for several runs, in the closest folder that contains all of them."""
    folders = [run if run.is_dir() else run.parent for run in runs]
    common = folders[0] if len(folders) == 1 else Path(os.path.commonpath([folder.resolve() for folder in folders]))
    return common / REPORT_FOLDER


def _state(run: RunLog) -> str:
    """A line of the page's header: name, progress, dates, and parts of the folder that could not be read."""
    stages = summarize_log(run)["stages"]
    done, steps = (sum(stage[key] for stage in stages) for key in ("steps_done", "steps"))
    seen = sessions_of(run)
    times = [f"{date_text(seen.started)} to {date_text(seen.last)} UTC"] if seen.started is not None else []
    times += [", then ".join(seen.hardware)] if seen.hardware else []
    return "; ".join([f"{run.name}: {done:,} of {steps:,} steps", *times, *run.problems])
