"""The result of a report in one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean

from titan_cpt.reporting.comparison import ComparisonRow, incomparable_datasets
from titan_cpt.reporting.curves import curve_groups
from titan_cpt.reporting.number_texts import token_text
from titan_cpt.reporting.run_log import RunLog


def verdict(runs: Sequence[RunLog], rows: Sequence[ComparisonRow]) -> str:
    """What one run learned and forgot, or which of several runs is best at what."""
    return _verdict_on_run(runs[0], rows[0]) if len(runs) == 1 else _verdict_on_runs(runs, rows)


def _verdict_on_run(run: RunLog, row: ComparisonRow) -> str:
    stage = next(stage for stage in run.plan["stages"] if stage["name"] == row.stage)
    begin = "After" if row.is_done else "So far, in"
    begin += f" stage {row.stage} ({token_text(row.tokens)} tokens in all)"
    if row.adaptation is None and not row.forgetting:
        return f"{begin}, no validation loss is recorded."
    parts = []
    if row.adaptation is not None:
        new = ", ".join(name for name in stage["new_datasets"] if name in row.losses) or "the new data"
        parts.append(f"the loss on {new} is {row.adaptation:.3f} nats per token")
    if row.forgetting:
        parts.append(_forgetting_text(row.forgetting))
        replayed = sum(use["replayed_tokens"] for use in stage["datasets"].values())
        share = f"{replayed / stage['tokens']:.1%} replay" if replayed and stage["tokens"] else "no replay"
        parts[-1] += f", with {share} and {row.update_share:.2f}x the compute of training again on all data"
    return f"{begin}, {' and '.join(parts)}."


def _forgetting_text(forgetting: Mapping[str, float]) -> str:
    texts = [
        f"that on {name} is {abs(value):.3f} {'above' if value > 0 else 'below'} where training on it ended"
        for name, value in forgetting.items()
    ]
    return " and ".join(texts)


def _verdict_on_runs(runs: Sequence[RunLog], rows: Sequence[ComparisonRow]) -> str:
    different = incomparable_datasets(rows)
    if different:
        return f"The runs are not comparable on {', '.join(different)}: validation data or windows differ."
    groups = curve_groups(runs)
    of_run = {id(run): row for run, row in zip(runs, rows, strict=True)}
    of_group = [(group.name, [of_run[id(run)] for run in group.runs]) for group in groups]
    average = {name: mean(values) for name, seeds in of_group if (values := _known(row.average for row in seeds))}
    forgetting = {
        name: mean(values) for name, seeds in of_group if (values := _known(row.mean_forgetting for row in seeds))
    }
    adaptation = {
        name: mean(values)
        for name, seeds in of_group
        if (values := _known(row.adaptation for row in seeds)) and name in forgetting
    }
    best = [
        f"{min(values, key=values.__getitem__)} {what} ({min(values.values()):{form}})"
        for what, values, form in (
            ("has the lowest mean loss", average, ".3f"),
            ("forgot least", forgetting, "+.3f"),
            ("learned the new data best", adaptation, ".3f"),
        )
        if len(values) > 1
    ]
    unfinished = sum(not row.is_done for row in rows)
    begin = f"Of {len(runs)} runs"
    begin += f" in {len(groups)} configurations" if len(groups) < len(runs) else ""
    begin += f" ({unfinished} unfinished)" if unfinished else ""
    if not best:
        return f"{begin}, fewer than two have validation losses to compare."
    *others, last = best
    text = f"{', '.join(others)} and {last}" if others else last
    return f"{begin}, {text}; losses in nats per token."


def _known(values: Iterable[float | None]) -> list[float]:
    """The values, if all are known."""
    found = list(values)
    known = [value for value in found if value is not None]
    return known if len(known) == len(found) else []
