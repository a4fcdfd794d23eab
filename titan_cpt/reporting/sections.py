"""The sections of the HTML report, each made by one function of the runs' logs; `sections` is their order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from titan_cpt.common.run_folder import CONFIG_FILE
from titan_cpt.reporting.benchmark_table import benchmark_table, example_generations
from titan_cpt.reporting.comparison import ComparisonRow, compare, incomparable_datasets
from titan_cpt.reporting.run_log import RunLog
from titan_cpt.reporting.summary import summarize_log

if TYPE_CHECKING:
    from titan_cpt.reporting.figures import Figure


@dataclass(frozen=True)
class HtmlTable:
    """A table: column heads, rows of text, and the (row, column) of cells in bold: the lowest number of a column."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()

    def is_number(self, column: int) -> bool:
        """Whether a column holds numbers, which are aligned right."""
        cells = [row[column] for row in self.rows if row[column]]
        return bool(cells) and all(cell[0] in "+-0123456789" for cell in cells)

    def without_empty_columns(self) -> HtmlTable:
        """The table without columns that have no text in any row, such as MFU on a CPU."""
        filled = [column for column in range(len(self.head)) if any(row[column] for row in self.rows)]
        return HtmlTable(
            [self.head[column] for column in filled], [[row[column] for column in filled] for row in self.rows]
        )


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        lead: one or two sentences below the title.
        details: (summary, text) of collapsed blocks; text is shown preformatted.
    """

    title: str
    lead: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[HtmlTable] = ()
    details: Sequence[tuple[str, str]] = ()


def sections(runs: Sequence[RunLog]) -> Iterator[Section]:
    """All sections, in the order of the page; one that has nothing to show is omitted."""
    rows = compare(runs)
    yield final_losses_section(rows)
    yield from loss_curves_section(runs)
    yield from trade_off_section(rows, runs)
    yield from learning_rates_section(runs)
    yield from benchmark_sections(runs)
    yield from data_section(runs)
    yield from throughput_section(runs)
    yield provenance_section(runs)


def final_losses_section(rows: Sequence[ComparisonRow]) -> Section:
    """Each run's final losses, forgetting, adaptation and cost."""
    datasets = sorted({name for row in rows for name in row.losses})
    head = ["run", *datasets, "AVG", "forgetting", "adaptation", "tokens", "compute of the last stage"]
    values = []
    for row in rows:
        adaptation = row.adaptation if row.forgetting else None  # a run from scratch has only new data
        values.append([*(row.losses.get(name) for name in datasets), row.average, row.mean_forgetting, adaptation])
    body = []
    for row, line in zip(rows, values, strict=True):
        losses = [_number(value, sign=column == len(datasets) + 1) for column, value in enumerate(line)]
        compute = f"{row.update_share:.2f}x" + ("" if row.is_done else f", still in {row.stage}")
        body.append([row.name, *losses, _count(row.tokens), compute])
    different = incomparable_datasets(rows)
    not_ranked = {*different, "AVG"} if different else set()
    best = set()
    for column, name in enumerate(head[1:-2]):
        known = [(value, index) for index, line in enumerate(values) if (value := line[column]) is not None]
        if len(known) > 1 and name not in not_ranked:
            best.add((min(known)[1], column + 1))
    return Section(
        "Final losses",
        "Validation loss in nats per token at the end of the last stage; the mean over its final window if it has one. "
        "AVG is the mean over the datasets trained on. Compute is the tokens of the last stage relative to training "
        "from scratch on all data. The lowest number of each column is bold."
        + (f" Not comparable, as validation data or windows differ: {', '.join(different)}." if different else ""),
        tables=[HtmlTable(head, body, frozenset(best))],
    )


def loss_curves_section(runs: Sequence[RunLog]) -> Iterator[Section]:
    """Validation loss of each dataset over tokens."""
    if any(run.validations for run in runs):
        from titan_cpt.reporting.figures import plot_losses, render_figure

        caption = (
            "Validation loss of each dataset over the tokens trained on. Dashed lines: ends of stages. Dotted lines: "
            "the dataset's validation data or windows changed; losses on the two sides are not comparable."
        )
        yield Section("Validation losses", figures=[render_figure("losses", caption, lambda: plot_losses(runs))])


def trade_off_section(rows: Sequence[ComparisonRow], runs: Sequence[RunLog]) -> Iterator[Section]:
    """Forgetting over adaptation, if at least two runs have both."""
    points = _trade_off_points(rows, runs)
    if len(points) > 1:
        from titan_cpt.reporting.figures import plot_trade_off, render_figure

        caption = (
            "One point per run; lower left is better. A hollow point is a run trained from scratch: its old data is "
            "compared with the mean loss at which the other runs left it."
        )
        figure = render_figure("trade-off", caption, lambda: plot_trade_off(points))
        yield Section("Trade-off between forgetting and adaptation", figures=[figure])


def _trade_off_points(rows: Sequence[ComparisonRow], runs: Sequence[RunLog]) -> list[tuple[int, ComparisonRow, float]]:
    """(index of the run, its row, forgetting in nats per token) of each run for which both numbers are known.

    For a run from scratch, forgetting is its mean loss on old data minus the mean loss at which the other runs left
    that data, and adaptation its mean loss on the data that is new in the other runs' last stage.
    """
    left_at: dict[tuple[str, str | None], list[float]] = {}  # by dataset and identity of its validation data
    for run in runs:
        for stage in summarize_log(run)["stages"]:
            for name, value in stage["left_at"].items():
                left_at.setdefault((name, stage["validation_ids"][name]), []).append(value)
    old = {name for name, _ in left_at}
    new = {name for run in runs for name in run.plan["stages"][-1]["new_datasets"] if name not in old}
    points = []
    for index, row in enumerate(rows):
        increases = [
            row.losses[name] - sum(losses) / len(losses)
            for (name, identity), losses in left_at.items()
            if name in row.losses and row.validation_ids.get(name) == identity
        ]
        forgetting = row.mean_forgetting if row.forgetting else sum(increases) / len(increases) if increases else None
        on_new = [row.losses[name] for name in new if name in row.losses]
        if forgetting is not None and row.adaptation is not None and on_new:
            point = row if row.forgetting else replace(row, adaptation=sum(on_new) / len(on_new))
            points.append((index, point, forgetting))
    return points


def learning_rates_section(runs: Sequence[RunLog]) -> Iterator[Section]:
    """The learning rate of each step."""
    if any(run.trains for run in runs):
        from titan_cpt.reporting.figures import plot_learning_rates, render_figure

        caption = "Learning rate of each training step."
        figure = render_figure("learning-rates", caption, lambda: plot_learning_rates(runs))
        yield Section("Learning rates", figures=[figure])


def benchmark_sections(runs: Sequence[RunLog]) -> Iterator[Section]:
    """For each run that has any: benchmark scores after each stage, and what it generated from the example prompts."""
    for run in runs:
        title = "Benchmarks" if len(runs) == 1 else f"Benchmarks of {run.name}"
        unread: list[str] = []
        table = benchmark_table(run, unread.append)
        texts = example_generations(run, unread.append)
        if table is not None or texts or unread:
            yield Section(
                title,
                "Scores with standard errors. Changes are paired by sample if both checkpoints were evaluated on the "
                "same samples; p is the probability of a change at least as large by chance. Below: text generated "
                "from the example prompts after each stage." + "".join(f" Not shown: {problem}." for problem in unread),
                tables=[] if table is None else [HtmlTable(table.head, table.rows)],
                details=texts,
            )


def data_section(runs: Sequence[RunLog]) -> Iterator[Section]:
    """Tokens, replay and epochs of each dataset in each stage."""
    rows = []
    for run in runs:
        progress = {stage["name"]: _progress(stage) for stage in summarize_log(run)["stages"]}
        for stage in run.plan["stages"]:
            for name, use in stage["datasets"].items():
                share = use["replayed_tokens"] / stage["tokens"]
                epochs = "unknown" if use["epochs"] is None else f"{use['epochs']:.2f}"
                replay = f"{_count(use['replayed_tokens'])} ({share:.1%})" if use["replayed_tokens"] else ""
                rows.append(
                    [run.name, stage["name"], name, _count(use["tokens"]), replay, epochs, progress[stage["name"]]]
                )
    if rows:
        yield Section(
            "Data",
            "Planned tokens of each stage by dataset. Replay: tokens of a dataset of earlier stages, in percent of the "
            "stage. Epochs: how often the stage repeats the dataset. Trained: how much of the stage is done.",
            tables=[HtmlTable(["run", "stage", "dataset", "tokens", "replay", "epochs", "trained"], rows)],
        )


def throughput_section(runs: Sequence[RunLog]) -> Iterator[Section]:
    """Tokens per second, model FLOPs utilization and memory."""
    if any(line.get("tokens_per_s") for run in runs for line in run.trains):
        from titan_cpt.reporting.figures import plot_throughput, render_figure

        caption = "Training throughput, without the time of validation and checkpoints."
        figure = render_figure("throughput", caption, lambda: plot_throughput(runs))
        head = ["run", "recorded steps", "seconds of these steps", "tokens per second", "MFU", "memory, GiB"]
        table = HtmlTable(head, [_throughput_row(run) for run in runs]).without_empty_columns()
        yield Section("Throughput", figures=[figure], tables=[table])


def _throughput_row(run: RunLog) -> list[str]:
    stages = summarize_log(run)["stages"]
    seconds, timed, done = (sum(stage[key] for stage in stages) for key in ("seconds", "timed_steps", "steps_done"))
    tokens = timed * run.plan["step_tokens"]
    mfus = [line["mfu"] for line in run.trains if line.get("mfu")]
    memory = max((line["memory_gib"] for line in run.trains if line.get("memory_gib")), default=None)
    return [
        run.name,
        f"{timed:,} of {done:,}",
        f"{seconds:,.0f}",
        f"{tokens / seconds:,.0f}" if seconds else "",
        f"{sum(mfus) / len(mfus):.1%}" if mfus else "",
        "" if memory is None else f"{memory:.2f}",
    ]


def provenance_section(runs: Sequence[RunLog]) -> Section:
    """Plan fingerprint, package versions, data fingerprints and resolved config of each run."""
    rows = []
    details = []
    for run in runs:
        start: Mapping[str, Any] = next((event for event in reversed(run.events) if event["name"] == "start"), {})
        versions = ", ".join(f"{name} {value}" for name, value in start.get("versions", {}).items())
        rows.append([run.name, str(run.plan["fingerprint"]), str(start.get("world_size", "")), versions])
        data = "".join(f"{name:<40} {value}\n" for name, value in start.get("data", {}).items())
        if data:
            details.append((f"{run.name}: fingerprints of the data", data))
        config = run.folder / CONFIG_FILE
        if config.exists():
            text = config.read_text(encoding="utf-8", errors="replace")
            details.append((f"{run.name}: config with all defaults", text))
    return Section("Reproduction", tables=[HtmlTable(["run", "plan", "ranks", "versions"], rows)], details=details)


def _progress(stage: Mapping[str, Any]) -> str:
    """How much of a stage is trained."""
    if not stage["is_begun"]:
        return "not begun"
    done = stage["steps_done"]
    return "all" if done >= stage["steps"] else f"{done:,} of {stage['steps']:,} steps"


def _number(value: float | None, *, sign: bool) -> str:
    return "" if value is None else f"{value:+.4f}" if sign else f"{value:.4f}"


def _count(tokens: int) -> str:
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if tokens >= size:
            return f"{tokens / size:.4g}{unit}"
    return str(tokens)
