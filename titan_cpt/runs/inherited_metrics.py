"""metrics.jsonl of a run that begins with a checkpoint of another run: a branch, or a sweep run with shared stages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from titan_cpt.common.files import write_text_atomically
from titan_cpt.common.metrics_file import read_metrics
from titan_cpt.common.run_folder import METRICS_FILE


def copy_metrics(
    source: Path, target: Path, *, stages: Sequence[str], until: Mapping[str, int | None], event: Mapping[str, Any]
) -> None:
    """Write the target's metrics.jsonl: the source's lines up to the checkpoint, then an event that names the source.

    The copied lines include the validation losses at step 0 of each stage, from which forgetting is measured.

    Args:
        source: folder of the run whose checkpoint is used.
        target: folder of the new run.
        stages: names of the source's stages, in the order of its plan.
        until: the stages to copy, each with its last step, or None for all of its steps.
        event: the keys of the event, without `kind`.
    """
    metrics = read_metrics(source, stages)
    lines = [
        line
        for line in [*metrics.trains, *metrics.validations, *metrics.renewed, *metrics.registered]
        if line["stage"] in until and _is_before(line["step"], until[line["stage"]])
    ]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"kind": "event", **event}])
    write_text_atomically(target / METRICS_FILE, text)


def _is_before(step: int, last_step: int | None) -> bool:
    return last_step is None or step <= last_step
