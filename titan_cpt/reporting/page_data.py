"""The data behind a report's page: summaries as JSON, the points of all curves as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from titan_cpt.reporting.comparison import compare
from titan_cpt.reporting.curves import recorded_steps
from titan_cpt.reporting.run_log import RunLog
from titan_cpt.reporting.summary import summarize_log

MARK_LENGTH = 32
"""The first characters of each file, which are always the same, mark a file that a report wrote."""
_PLACE = ("run", "stage", "step", "tokens")
_VALIDATION = ("dataset", "loss_nats_per_token", "forgetting_nats_per_token", "bits_per_byte", "validation_id")
_TRAINING = ("loss_nats_per_token", "grad_norm", "lr", "replayed_tokens", "tokens_per_s", "mfu", "memory_gib")


def data_files(runs: Sequence[RunLog]) -> dict[str, str]:
    """{file name: content}.

    report.json has the summary of each run (as summary.json) and its row of the comparison; losses.csv has every
    validation; steps.csv has at most 500 training steps of each run, those of the figures.
    """
    content = {"written_by": "titan-cpt report", "runs": summaries_of(runs)}
    return {
        "report.json": json.dumps(content, indent=1) + "\n",
        "losses.csv": _csv(_VALIDATION, [(run, run.validations) for run in runs]),
        "steps.csv": _csv(_TRAINING, [(run, recorded_steps(run)) for run in runs]),
    }


def summaries_of(runs: Sequence[RunLog]) -> list[dict[str, Any]]:
    """For each run its name, the keys of its summary.json, and its row of the comparison."""
    rows = compare(runs)
    return [
        {"run": run.name, **summarize_log(run), "comparison": vars(row) | {"mean_forgetting": row.mean_forgetting}}
        for run, row in zip(runs, rows, strict=True)
    ]


def _csv(keys: Sequence[str], lines: Sequence[tuple[RunLog, Sequence[Mapping[str, Any]]]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_PLACE, *keys])
    for run, found in lines:
        for line in found:
            place = (run.name, line["stage"], line["step"], run.tokens_at(line["stage"], line["step"]))
            writer.writerow([*place, *(line.get(key) for key in keys)])
    return text.getvalue()
