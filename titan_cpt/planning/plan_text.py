"""The plan as text: a table of stages, a drawing of the LR schedule, parallelism, memory, costs and notes."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from titan_cpt.planning.parallel_text import parallel_lines
from titan_cpt.planning.plan import Plan
from titan_cpt.planning.plan_json import stage_as_json

_BARS = " ▁▂▃▄▅▆▇█"
_ASCII = str.maketrans(f"{_BARS}│", " ....####|")  # for terminals without UTF-8
_DRAWING_WIDTH = 72
_DRAWING_HEIGHT = 6


def print_plan(plan: Plan, console: Console, keep_latest_k: int, device_bytes: int | None = None) -> None:
    """Print the plan.

    Args:
        keep_latest_k: number of interval checkpoints that the run keeps.
        device_bytes: memory of a device, to print whether the plan fits.
    """
    spec = plan.spec
    console.print(
        f"[bold]{plan.name}[/]  plan {plan.fingerprint}  {spec.family}, {spec.parameters:,} parameters "
        f"({spec.parameters_without_embeddings:,} without embeddings)",
        highlight=False,
    )
    console.print(
        f"step: {plan.global_batch_size} sequences x {plan.seq_len} = {plan.step_tokens:,} tokens; "
        f"{plan.world_size} rank{'s' * (plan.world_size > 1)}, {plan.data_parallel} data-parallel x "
        f"{plan.local_batch_size} sequences x {plan.gradient_accumulation_steps} gradient accumulation steps",
        highlight=False,
    )
    console.print(_stage_table(plan))
    for line in _lr_drawing(plan):
        console.print(line.translate(_ASCII) if console.options.ascii_only else line, highlight=False, markup=False)
    console.print()
    for line in [*parallel_lines(plan, device_bytes), *_cost_lines(plan, keep_latest_k)]:
        console.print(line, highlight=False)
    for note in plan.notes:
        console.print(f"[yellow]note[/] {escape(note)}", highlight=False)


def _stage_table(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("stage", "from", "steps", "tokens", "LR start", "peak", "end", "data (replay), epochs", "FLOPs"):
        table.add_column(name, justify="left" if name in ("stage", "from") or name.startswith("data") else "right")
    for index, stage in enumerate(plan.stages):
        row = stage_as_json(plan, stage, index)
        init = escape(stage.init) if isinstance(stage.init, str) else f"{stage.init.stage} @ {stage.init.steps_done:,}"
        data = [
            f"{name} {_count(use.tokens)}"
            + (f" ({_count(use.replayed_tokens)})" if use.replayed_tokens else "")
            + (", ? ep" if use.epochs is None else f", {use.epochs:.2f} ep")
            for name, use in stage.use_by_dataset.items()
        ]
        lrs = [f"{row[key]:.2e}" for key in ("start_lr", "peak_lr", "final_lr")]
        table.add_row(
            stage.name, init, f"{stage.steps:,}", _count(row["tokens"]), *lrs, "\n".join(data), f"{row['flops']:.2e}"
        )
    return table


def _lr_drawing(plan: Plan) -> list[str]:
    """The LR over all stages as a bar chart; the width of a stage is proportional to its steps."""
    total = sum(stage.steps for stage in plan.stages)
    columns: list[float | None] = []
    names = ""
    for stage in plan.stages:
        width = max(8, round(_DRAWING_WIDTH * stage.steps / total))
        steps = [min(stage.steps - 1, int((column + 0.5) * stage.steps / width)) for column in range(width)]
        columns += [stage.lr_at(step) for step in steps] + [None]
        names += stage.name[: width - 1].ljust(width + 1)
    top = max(lr for lr in columns if lr is not None)
    rows = []
    for level in range(_DRAWING_HEIGHT, 0, -1):
        label = f"{top:.1e} " if level == _DRAWING_HEIGHT else " " * 8
        rows.append(label + "".join("│" if lr is None else _bar(lr / top, level) for lr in columns).rstrip())
    return [*rows, " " * 8 + names.rstrip()]


def _bar(height: float, level: int) -> str:
    eighths = round(height * _DRAWING_HEIGHT * 8) - (level - 1) * 8
    return _BARS[max(0, min(8, eighths))]


def _cost_lines(plan: Plan, keep_latest_k: int) -> list[str]:
    flops = plan.spec.flops_per_token(plan.seq_len) * plan.step_tokens
    total = sum(stage.steps for stage in plan.stages)
    lines = [f"total: {_count(total * plan.step_tokens)} tokens, {flops * total:.2e} FLOPs"]
    if len(plan.stages) > 1:
        last = plan.stages[-1]
        lines.append(
            f"continual pre-training on {last.name!r}: {_count(last.steps * plan.step_tokens)} tokens; retraining from "
            f"scratch on all data: {_count(total * plan.step_tokens)} (ratio {last.steps / total:.2f})"
        )
    disk = plan.disk_bytes(keep_latest_k)
    return [*lines, f"checkpoints: up to {disk / 2**30:.2f} GiB of disk space"]


def _count(tokens: int) -> str:
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if tokens >= size:
            return f"{tokens / size:.4g}{unit}"
    return str(tokens)
