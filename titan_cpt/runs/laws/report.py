"""`titan-cpt sweep`: fit the law of [sweep.fit] to the runs that are done, print it, and write fit.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from titan_cpt.common.files import write_text_atomically
from titan_cpt.config.sweep import SweepFitConfig
from titan_cpt.errors import ConfigError, DataError, how_to_install
from titan_cpt.runs.laws.advice import LawResult
from titan_cpt.runs.laws.laws import apply_law
from titan_cpt.runs.laws.measured import MeasuredRun, measured_runs
from titan_cpt.runs.sweep_runs import SweepRun, fit_settings, read_sweep_runs

FIT_FILE = "fit.json"


def require_fit(paths: Sequence[Path], overrides: Sequence[tuple[str, str]]) -> SweepFitConfig | None:
    """The settings of [sweep.fit]; None without the table.

    Raises:
        ConfigError: files have different tables.
        DataError: scipy is not installed.
    """
    tables = [table for path in paths if (table := fit_settings(path, overrides)) is not None]
    if not tables:
        return None
    if any(table != tables[0] for table in tables):
        raise ConfigError("sweep.fit: the files have different [sweep.fit] tables; leave one")
    if find_spec("scipy") is None:
        raise DataError(f"[sweep.fit] needs scipy, which is not installed; {how_to_install('scipy')}")
    return tables[0]


def fit_sweep(
    paths: Sequence[Path], overrides: Sequence[tuple[str, str]], settings: SweepFitConfig, console: Console
) -> None:
    """Fit the law to the runs that are done, print equation, residuals and advice, and write fit.json.

    Raises:
        DataError: the law cannot be fitted to these runs; the message says what is missing.
    """
    runs = read_sweep_runs(paths, overrides)
    folder = next(run.folder.parent for run in runs if isinstance(run, SweepRun))
    measured = measured_runs(runs, settings.stage, lambda text: console.print(escape(text), highlight=False))
    result = apply_law(settings, measured)
    print_law(result, settings, measured, console)
    write_text_atomically(folder / FIT_FILE, json.dumps(law_as_json(result, settings), indent=1))
    console.print(escape(f"written: {folder / FIT_FILE}"), highlight=False, soft_wrap=True)


def print_law(result: LawResult, settings: SweepFitConfig, runs: Sequence[MeasuredRun], console: Console) -> None:
    """Print the equation, its parameters with intervals, the residuals of every run, and what the law advises."""
    equation = next(iter(result.fits.values())).equation
    for line in (f"law {result.law}: {equation.text}", f"source: {equation.source}"):
        console.print(escape(line), highlight=False, soft_wrap=True)
    table = Table(header_style="bold", title="parameters, with half the width of their intervals", title_justify="left")
    table.add_column("dataset")
    for column in (*equation.names, "points", "RMS"):
        table.add_column(column, justify="right")
    for name, fitted in result.fits.items():
        cells = [_parameter(value, half) for _, value, half in fitted.intervals(settings.confidence)]
        table.add_row(escape(name), *cells, str(len(fitted.residuals)), f"{fitted.rms:.4f}")
    console.print(table)
    console.print(_residuals(result, runs))
    console.print(
        "residuals: measured - fitted, in nats per token, the largest of a run's validations; ?: these runs leave the "
        "parameter open, not the fitted losses",
        highlight=False,
    )
    for name, limit in result.limits.items():
        console.print(escape(f"limit of {name}: {limit:.4f} nats per token"), highlight=False)
    for line in result.answers:
        console.print(escape(line), highlight=False)


def _parameter(value: float, half: float | None) -> str:
    return f"{value:.4g} ?" if half is None else f"{value:.4g} ± {half:.2g}"


def _residuals(result: LawResult, runs: Sequence[MeasuredRun]) -> Table:
    table = Table(header_style="bold", title="residuals", title_justify="left")
    table.add_column("run", overflow="fold")
    table.add_column(result.variable, justify="right")
    for name in result.fits:
        table.add_column(escape(name), justify="right")
    for run in runs:
        if run.name not in result.values:
            continue
        cells = []
        for name, fitted in result.fits.items():
            own = [
                residual
                for (owner, _), residual in zip(result.points[name], fitted.residuals, strict=True)
                if owner == run.name
            ]
            cells.append(f"{max(own, key=abs):+.4f}" if own else "")
        table.add_row(escape(run.name), escape(result.values[run.name]), *cells)
    return table


def law_as_json(result: LawResult, settings: SweepFitConfig) -> dict[str, Any]:
    """The contents of fit.json: settings, parameters, every point with its residual, limits and advice."""
    return {
        "law": result.law,
        "settings": settings.model_dump(mode="json", exclude_none=True),
        "limits": result.limits,
        "answer": result.answer,
        "answers": result.answers,
        "datasets": {
            name: {
                "equation": fitted.equation.text,
                "source": fitted.equation.source,
                "parameters": {
                    parameter: {"value": value, "half_width": half}
                    for parameter, value, half in fitted.intervals(settings.confidence)
                },
                "rms": fitted.rms,
                "points": [
                    {"run": run, "x": [float(each) for each in x], "residual": float(residual)}
                    for (run, x), residual in zip(result.points[name], fitted.residuals, strict=True)
                ],
            }
            for name, fitted in result.fits.items()
        },
    }
