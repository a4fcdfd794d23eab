"""The result of a report in one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean

from titan_cpt.common.weights.named_weights import AVERAGE_SUFFIX, split_average
from titan_cpt.reporting.comparison import (
    ComparisonRow,
    incomparable_datasets,
    means_over_different_datasets,
    with_averages,
)
from titan_cpt.reporting.curves import seed_groups
from titan_cpt.reporting.number_texts import token_text
from titan_cpt.reporting.run_log import RunLog


def verdict(runs: Sequence[RunLog], rows: Sequence[ComparisonRow]) -> str:
    """What one run learned and forgot, or which of several runs is best at what."""
    if len(runs) == 1:
        return _verdict_on_run(runs[0], rows)
    if len(seed_groups(runs)) > 1 or incomparable_datasets(rows):
        return _verdict_on_runs(runs, rows)
    done = [row for row in rows if row.is_done]
    begin = f"{len(runs)} seeds of one configuration"
    begin += f", {len(done) or 'none'} finished" if len(done) < len(runs) else ""
    return f"{begin}. {_verdict_on_run(runs[0], done)}" if done else f"{begin}."


def _verdict_on_run(run: RunLog, rows: Sequence[ComparisonRow]) -> str:
    """On a run, or on the means over its seeds with the lowest and the highest value."""
    row = rows[0]
    stage = next(stage for stage in run.plan["stages"] if stage["name"] == row.stage)
    begin = "After" if row.is_done else "So far, in"
    begin += f" stage {row.stage} ({token_text(row.tokens)} tokens in all)"
    if row.adaptation is None and not row.forgetting:
        return f"{begin}, no validation loss is recorded."
    parts = []
    if row.adaptation is not None:
        new = ", ".join(name for name in stage["new_datasets"] if name in row.losses) or "the new data"
        values = _known(seed.adaptation for seed in rows) or [row.adaptation]
        averages = _known(seed.adaptation for seed in with_averages(rows) if split_average(seed.name)[1])
        text = f"the loss on {new} is {mean(values):.3f}{_range_text(values, '.3f')} nats per token"
        if len(averages) == len(values):
            text += f", {mean(averages):.3f}{_range_text(averages, '.3f')} with the average of the weights"
        parts.append(text)
    if row.forgetting:
        parts.append(_forgetting_text([seed.forgetting for seed in rows]))
        replayed = sum(use["replayed_tokens"] for use in stage["datasets"].values())
        share = f"{replayed / stage['tokens']:.1%} replay" if replayed and stage["tokens"] else "no replay"
        parts[-1] += f", with {share} and {row.update_share:.2f}x the compute of training again on all data"
    return f"{begin}, {' and '.join(parts)}."


def _forgetting_text(forgetting: Sequence[Mapping[str, float]]) -> str:
    texts = []
    for name in forgetting[0]:
        values = [seed[name] for seed in forgetting if name in seed]
        place = f"{'above' if mean(values) > 0 else 'below'} where training on it ended"
        texts.append(f"that on {name} is {abs(mean(values)):.3f} {place}{_range_text(values, '+.3f')}")
    return " and ".join(texts)


def _range_text(values: Sequence[float], form: str) -> str:
    return f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""


def _verdict_on_runs(runs: Sequence[RunLog], rows: Sequence[ComparisonRow]) -> str:
    different = incomparable_datasets(rows)
    if different:
        return f"The runs are not comparable on {', '.join(different)}: validation data or windows differ."
    groups = seed_groups(runs)
    mixed = means_over_different_datasets(rows)
    of_run = {id(run): row for run, row in zip(runs, rows, strict=True)}
    of_group = [each for group in groups for each in _compared(group.name, [of_run[id(run)] for run in group.runs])]
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
        for column, what, values, form in (
            ("AVG", "has the lowest mean loss", average, ".3f"),
            ("forgetting", "forgot least", forgetting, "+.3f"),
            ("adaptation", "learned the new data best", adaptation, ".3f"),
        )
        if len(values) > 1 and column not in mixed
    ]
    unfinished = sum(not row.is_done for row in rows)
    begin = f"Of {len(runs)} runs"
    begin += f" in {len(groups)} configurations" if len(groups) < len(runs) else ""
    begin += f" ({unfinished} unfinished)" if unfinished else ""
    not_ranked = f"not ranked, as means over different datasets: {', '.join(mixed)}"
    if not best and mixed:
        return f"{begin}, no winner: {not_ranked}."
    if not best:
        return f"{begin}, fewer than two have validation losses to compare."
    *others, last = best
    text = f"{', '.join(others)} and {last}" if others else last
    return f"{begin}, {text}; losses in nats per token{'; ' + not_ranked if mixed else ''}."


def _compared(name: str, seeds: Sequence[ComparisonRow]) -> list[tuple[str, Sequence[ComparisonRow]]]:
    """A configuration by name, and if all of its seeds have one, the average of its weights."""
    averages = [row for row in with_averages(seeds) if split_average(row.name)[1]]
    of_averages = [(f"{name}{AVERAGE_SUFFIX}", averages)] if len(averages) == len(seeds) else []
    return [(name, seeds), *of_averages]


def _known(values: Iterable[float | None]) -> list[float]:
    """The values, if all are known."""
    found = list(values)
    known = [value for value in found if value is not None]
    return known if len(known) == len(found) else []
