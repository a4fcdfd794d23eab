"""The plan as text: a table of stages, a drawing of the LR schedule, parallelism, memory, costs and notes.

Every line fits the console's width, except where a single word, such as a path, is longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from rich.console import Console
from rich.text import Text

from titan_cpt.common.readable import memory, shortest_count
from titan_cpt.common.text import wrapped
from titan_cpt.planning.parallel_text import parallel_lines
from titan_cpt.planning.plan import Plan, StageCheckpoint, StagePlan
from titan_cpt.planning.plan_json import stage_as_json
from titan_cpt.planning.stages.new_rows import new_rows_lines

_BARS = " ▁▂▃▄▅▆▇█"
_ASCII = str.maketrans(f"{_BARS}│", " ....####|")  # for terminals without UTF-8
_WIDEST_DRAWING = 112
_LABEL_WIDTH = 8  # of the drawing: the highest LR
_DRAWING_HEIGHT = 6
_NARROWEST_STAGE = 8  # columns of a stage in the drawing, if there is room


def print_plan(plan: Plan, console: Console, keep_latest_k: int, device_bytes: int | None = None) -> None:
    """Print the plan.

    Args:
        keep_latest_k: number of interval checkpoints that the run keeps.
        device_bytes: memory of a device, to print whether the plan fits.
    """
    width = console.width
    _print(console, f"{plan.name}  plan {plan.fingerprint}", bold=len(plan.name))
    for line in (_model_line(plan), *_step_lines(plan)):
        _print_wrapped(console, line)
    for number, line in enumerate(_stage_lines(plan, width)):
        _print(console, line, bold=len(line) if number == 0 else 0)
    for line in (
        *_packing_lines(plan),
        *_rope_lines(plan),
        *new_rows_lines(plan.stages),
        *_continued_schedules(plan),
        *_warm_ups(plan),
        *_partitions(plan),
        *_pulls(plan),
        *_averages(plan),
    ):
        _print_wrapped(console, line)
    for line in _lr_drawing(plan, min(width, _WIDEST_DRAWING)):
        _print(console, line.translate(_ASCII) if console.options.ascii_only else line)
    _print(console, "")
    for line in [*parallel_lines(plan, device_bytes), *_cost_lines(plan, keep_latest_k)]:
        _print_wrapped(console, line)
    print_notes(plan.notes, console)


def print_notes(notes: Sequence[str], console: Console) -> None:
    """Print notes, wrapped to the console's width; the lines of a note that has several are wrapped one by one."""
    for note in notes:
        first, *more = f"note {note}".splitlines()
        for number, line in enumerate(wrapped(first, console.width)):
            _print(console, line, yellow=4 if number == 0 else 0)
        for line in more:
            _print_wrapped(console, line)


def _print_wrapped(console: Console, text: str) -> None:
    for line in wrapped(text, console.width):
        _print(console, line)


def _print(console: Console, line: str, *, bold: int = 0, yellow: int = 0) -> None:
    """Print a line as it is, its first characters in bold or yellow."""
    text = Text(line)
    text.stylize("bold", 0, bold)
    text.stylize("yellow", 0, yellow)
    console.print(text, soft_wrap=True)


def _model_line(plan: Plan) -> str:
    spec = plan.spec
    without = f"{spec.parameters_without_embeddings:,} without embeddings"
    return f"model: {spec.family}, {spec.parameters:,} parameters ({without})"


def _step_lines(plan: Plan) -> Iterator[str]:
    """A line for the steps of all stages, or one for the steps of each stage and each batch size of a ramp."""
    ranks = f"{plan.world_size} rank{'s' * (plan.world_size > 1)}, {plan.data_parallel} data-parallel"
    steps = {stage.name: list(_step_phases(plan, stage)) for stage in plan.stages}
    usual = next(iter(steps.values()))
    if len(usual) == 1 and all(phases == usual for phases in steps.values()):
        _, tokens, local = usual[0]
        yield f"step: {tokens}; {ranks} x {local}"
        return
    yield f"steps of {ranks} rank{'s' * (plan.data_parallel > 1)}:"
    for stage in plan.stages:
        of_rank = f"{stage.flops_per_token:.2e} FLOPs per token, {memory(plan.footprints[stage.name].memory / 2**30)}"
        for first, tokens, local in steps[stage.name]:
            begins = f" from step {first + 1:,}" if first else ""
            yield f"  {stage.name}{begins}: {tokens}; {local}" + ("" if first else f"; {of_rank} per rank")


def _step_phases(plan: Plan, stage: StagePlan) -> Iterator[tuple[int, str, str]]:
    """The first step of each batch size, its tokens, and what a data-parallel rank computes, in words."""
    for phase in stage.batch_sizes.within(stage.steps):
        accumulation = plan.accumulation(stage, phase.first_step)
        accumulated = f" x {accumulation} gradient accumulation steps"
        yield (
            phase.first_step,
            f"{_sequences(phase.size)} x {stage.seq_len} = {phase.size * stage.seq_len:,} tokens",
            _sequences(stage.local_batch_size) + (accumulated if accumulation > 1 else ", no gradient accumulation"),
        )


def _sequences(count: int) -> str:
    return f"{count} sequence{'s' * (count != 1)}"


def _stage_lines(plan: Plan, width: int) -> list[str]:
    """The table of stages, a line each; if that is wider than `width`, a second line has the weights and the data."""
    rows = [
        ["stage", "from", "steps", "tokens", "LR start", "peak", "end", "data (replay), epochs", "FLOPs"],
        *(_row(plan, stage) for stage in plan.stages),
    ]
    data = [_uses(stage) for stage in plan.stages]
    for row, uses in zip(rows[1:], data, strict=True):
        row[7] = uses[0] if uses else ""
    widths = [max(len(row[column]) for row in rows) for column in range(9)]
    widths[7] = max([len(rows[0][7]), *(len(use) for uses in data for use in uses)])
    if sum(widths) + 2 * 8 <= width:
        lines = [_columns(rows[0], widths)]
        for row, uses in zip(rows[1:], data, strict=True):
            lines.append(_columns(row, widths))
            lines += [_columns(["", "", "", "", "", "", "", use, ""], widths) for use in uses[1:]]
        return lines
    numbers = [2, 3, 4, 5, 6, 8]
    room = width - sum(widths[column] + 2 for column in numbers)
    name_width = max((len(row[0]) for row in rows if len(row[0]) <= room), default=0)
    lines = []
    for row, uses in zip(rows, [[], *data], strict=True):
        cells = "".join(f"  {row[column]:>{widths[column]}}" for column in numbers)
        lines += [f"{row[0]:<{name_width}}{cells}"] if len(row[0]) <= name_width else [row[0], " " * name_width + cells]
        if uses:
            lines += wrapped(f"  from {row[1]}; data (replay): {'; '.join(uses)}", width)
    return lines


def _rope_lines(plan: Plan) -> Iterator[str]:
    """A line for each stage that changes the RoPE of its initial weights; of those from elsewhere it is [model]'s."""
    for stage in plan.stages:
        first = plan.stage(stage.init.stage).spec if isinstance(stage.init, StageCheckpoint) else plan.spec
        if first.rope != stage.spec.rope:
            yield f"RoPE from {stage.name} on: {stage.spec.rope}; before: {first.rope}"


def _continued_schedules(plan: Plan) -> Iterator[str]:
    """A line for every LR schedule that spans several stages."""
    for stage in plan.stages:
        spanned = plan.schedule_span(stage)
        if len(spanned) > 1 and stage is spanned[0]:
            names = ", ".join(each.name for each in spanned[1:])
            steps = sum(each.steps for each in spanned)
            yield (
                f"LR schedule of {stage.name}: {steps:,} steps in {len(spanned)} stages; {names} "
                f"{'continue' if len(spanned) > 2 else 'continues'} it, with the optimizer state kept"
            )


def _warm_ups(plan: Plan) -> Iterator[str]:
    """A line for every stage that warms up its optimizer state: what that costs beside the token budget."""
    for stage in plan.stages:
        if passes := stage.warm_up_passes:
            tokens = shortest_count(stage.tokens_before(passes))
            yield (
                f"optimizer state of {stage.name}: warmed up at LR 0 on the batches of its first {passes:,} steps; "
                f"takes as long as these steps ({passes / stage.steps:.1%} of the stage), {tokens} tokens and "
                f"{stage.warm_up_flops:.2e} FLOPs, which the token budget and the totals do not include"
            )


def _partitions(plan: Plan) -> Iterator[str]:
    """A line for every stage that does not train all weights alike."""
    for stage in plan.stages:
        if stage.partition is not None:
            yield f"stage {stage.name} trains {stage.partition.description}"


def _pulls(plan: Plan) -> Iterator[str]:
    """A line for every stage with Reptile."""
    for stage in plan.stages:
        if pull := stage.reptile:
            where = "host" if pull.on_host else "device"
            yield (
                f"Reptile in {stage.name}: after every {pull.every:,} steps the weights become old + {pull.step:g} x "
                f"(new - old), {stage.steps // pull.every:,} times; the old weights are kept in {where} memory, and in "
                "the checkpoints between two pulls"
            )


def _averages(plan: Plan) -> Iterator[str]:
    """A line for each kind of average, with the stages that keep one."""
    stages: dict[str, list[str]] = {}
    for stage in plan.stages:
        if averaging := stage.averaging:
            where = "host" if averaging.on_host else "device"
            line = (
                f"{averaging.description}; a window of {averaging.size:,} snapshots, {averaging.every:,} steps apart; "
                f"copies of the weights: {averaging.in_memory:,} in {where} memory, "
                f"{averaging.saved(resumable=True):,} in a checkpoint within the stage, one at its end"
            )
            stages.setdefault(line, []).append(stage.name)
    for line, names in stages.items():
        yield f"average of {', '.join(names)}: {line}"


def _columns(cells: Sequence[str], widths: Sequence[int]) -> str:
    left = (0, 1, 7)
    aligned = [
        f"{cell:<{width}}" if column in left else f"{cell:>{width}}"
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(aligned).rstrip()


def _checkpoint(init: StageCheckpoint) -> str:
    return f"{init.stage} @ {init.steps_done:,}{', average' if init.average else ''}"


def _row(plan: Plan, stage: StagePlan) -> list[str]:
    row = stage_as_json(plan, stage)
    init = stage.init if isinstance(stage.init, str) else _checkpoint(stage.init)
    lrs = [f"{row[key]:.2e}" for key in ("start_lr", "peak_lr", "final_lr")]
    tokens = shortest_count(row["tokens"])
    return [stage.name, init, f"{stage.steps:,}", tokens, *lrs, "", f"{row['flops']:.2e}"]


def _uses(stage: StagePlan) -> list[str]:
    """For each dataset of a stage: its tokens, those of them that are replay, epochs."""
    return [
        f"{name} {shortest_count(use.tokens)}"
        + (f" ({shortest_count(use.replayed_tokens)})" if use.replayed_tokens else "")
        + (", ? ep" if use.epochs is None else f", {use.epochs:.2f} ep")
        for name, use in stage.use_by_dataset.items()
    ]


def _packing_lines(plan: Plan) -> Iterator[str]:
    """How full the packed sequences of each source are, and how many documents are cut."""
    for (source, seq_len), counts in plan.packing.items():
        cut = counts.cut_documents / max(1, counts.documents)
        yield (
            f"packing: {source}, {shortest_count(counts.documents)} documents in "
            f"{shortest_count(counts.sequences)} sequences of {seq_len}, {counts.fill(seq_len):.2%} full; "
            f"{cut:.2%} of the documents are longer and cut"
        )


def _lr_drawing(plan: Plan, width: int) -> list[str]:
    """The LR over all stages as a bar chart; the width of a stage is about proportional to its steps."""
    widths = _stage_widths([stage.steps for stage in plan.stages], width - _LABEL_WIDTH)
    columns: list[float | None] = []
    for stage, room in zip(plan.stages, widths, strict=False):
        steps = [min(stage.steps - 1, int((column + 0.5) * stage.steps / room)) for column in range(room)]
        columns += [stage.lr_at(step) for step in steps] + [None]
    top = max(lr for lr in columns if lr is not None) or 1.0  # all zero: no bars
    rows = []
    for level in range(_DRAWING_HEIGHT, 0, -1):
        label = (f"{top:.1e} " if level == _DRAWING_HEIGHT else "").ljust(_LABEL_WIDTH)
        rows.append((label + "".join("│" if lr is None else _bar(lr / top, level) for lr in columns)).rstrip())
    names = [stage.name for stage in plan.stages[: len(widths)]]
    label = ""
    if any(len(name) > room for name, room in zip(names, widths, strict=True)):
        names, label = [str(number) for number in range(1, len(widths) + 1)], "stage"
    legend = "".join(name[:room].ljust(room + 1) for name, room in zip(names, widths, strict=True)).rstrip()
    more = [f"{'':{_LABEL_WIDTH}}and {len(plan.stages) - len(widths)} more stages"] * (len(widths) < len(plan.stages))
    return [*rows, label.ljust(_LABEL_WIDTH) + legend, *more]


def _stage_widths(steps: Sequence[int], width: int) -> list[int]:
    """Columns of each stage in a drawing `width` wide, where a border follows each; only of the first that fit."""
    steps = steps[: max(1, width // 3)]
    room = max(len(steps), width - len(steps))
    least = min(_NARROWEST_STAGE, room // len(steps))
    rest, total = room - least * len(steps), sum(steps)
    ends = [round(rest * sum(steps[:index]) / total) for index in range(len(steps) + 1)]
    return [least + end - begin for begin, end in pairwise(ends)]


def _bar(height: float, level: int) -> str:
    eighths = round(height * _DRAWING_HEIGHT * 8) - (level - 1) * 8
    return _BARS[max(0, min(8, eighths))]


def _cost_lines(plan: Plan, keep_latest_k: int) -> list[str]:
    total = sum(stage.tokens for stage in plan.stages)
    flops = sum(stage.flops_per_token * stage.tokens for stage in plan.stages)
    lines = [f"total: {shortest_count(total)} tokens, {flops:.2e} FLOPs"]
    if len(plan.stages) > 1:
        last = plan.stages[-1]
        lines.append(
            f"continual pre-training on {last.name!r}: {shortest_count(last.tokens)} tokens; "
            f"retraining from scratch on all data: {shortest_count(total)} (ratio {last.tokens / total:.2f})"
        )
    disk = plan.disk_bytes(keep_latest_k)
    return [*lines, f"checkpoints: up to {memory(disk / 2**30)} of disk space"]
