"""Tables of a sweep: its runs before training, and their final losses after it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from titan_cpt.common.readable import significant
from titan_cpt.common.recipe import fingerprint
from titan_cpt.common.run_folder import METRICS_FILE
from titan_cpt.planning.suggest import ASSUMED_EFFICIENCY, nearest_device
from titan_cpt.reporting.comparison import compare, print_comparison
from titan_cpt.reporting.run_log import read_runs, with_unique_names
from titan_cpt.runs.shared_stages import count_shared_stages
from titan_cpt.runs.sweep import Outcome, single_run_message
from titan_cpt.runs.sweep_runs import InvalidSweepRun, SweepRun, read_sweep_runs, single_run_file


def print_outcomes(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print a table of all runs with their losses, and the error messages of those that failed."""
    started = [outcome.folder for outcome in outcomes if outcome.folder and (outcome.folder / METRICS_FILE).exists()]
    records = with_unique_names(read_runs(started, lambda message: console.print(escape(message), highlight=False)))
    names = {record.folder: record.name for record in records}
    failed = {
        names.get(each.folder, each.name) if each.folder else each.name: each.message
        for each in outcomes
        if each.state == "failed"
    }
    print_comparison(compare(records), console, failed)


def print_sweep_plan(paths: Sequence[Path], overrides: Sequence[tuple[str, str]], console: Console) -> None:
    """Print number, name, steps, tokens, FLOPs, shared stages and state of every run of the sweep files."""
    runs = read_sweep_runs(paths, overrides)
    valid = [run for run in runs if isinstance(run, SweepRun)]
    table = Table(header_style="bold")
    for column in ("run", "name", "plan", "steps", "tokens", "FLOPs", "shared stages", "state"):
        table.add_column(column, justify="right" if column in ("run", "steps", "tokens", "FLOPs") else "left")
    for number, run in enumerate(runs):
        if isinstance(run, InvalidSweepRun):
            table.add_row(str(number), escape(run.name), *[""] * 5, "invalid")
        else:
            table.add_row(str(number), *_cells(run, valid))
    console.print(table)
    console.print(_total(valid), highlight=False, soft_wrap=True)
    if (single := single_run_file(paths)) is not None:
        console.print(single_run_message(single), highlight=False, markup=False, soft_wrap=True)
    for run in runs:
        if isinstance(run, InvalidSweepRun):
            console.print(f"[bold]{escape(run.name)}[/]: {escape(run.problem)}", highlight=False)


def _total(runs: Sequence[SweepRun]) -> str:
    """Tokens, compute and GPU hours of the runs that are not done; a stage that several runs share counts once."""
    tokens, flops = 0, 0.0
    counted: set[str] = set()
    waiting = [run for run in runs if not run.is_done()]
    for run in waiting:
        for index, stage in enumerate(run.plan.stages):
            recipe = fingerprint(run.plan.recipe_until(index))
            if recipe in counted:
                continue
            counted.add(recipe)
            tokens += stage.tokens
            flops += stage.flops_per_token * stage.tokens
    device = nearest_device(80 * 10**9)
    hours = flops / (device.flops * ASSUMED_EFFICIENCY) / 3600
    return (
        f"to train: {len(waiting)} of {len(runs)} runs, {tokens:,} tokens, {flops:.2e} FLOPs, shared stages counted "
        f"once: {significant(hours, 6)} GPU hours at {ASSUMED_EFFICIENCY:.0%} of an {device.name}'s "
        f"{device.flops / 1e12:.0f} TFLOP/s"
    )


def _cells(run: SweepRun, runs: Sequence[SweepRun]) -> list[str]:
    steps = sum(stage.steps for stage in run.plan.stages)
    tokens, flops = run.plan.tokens_at(steps), run.plan.flops_at(steps)
    shared = ", ".join(stage.name for stage in run.plan.stages[: count_shared_stages(run, runs)])
    state = "done" if run.is_done() else ""
    return [escape(run.name), run.plan.fingerprint, f"{steps:,}", f"{tokens:,}", f"{flops:.2e}", shared, state]
