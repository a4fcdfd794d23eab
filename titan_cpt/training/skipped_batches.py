"""Batches that training skips because their loss or gradient was bad: part of the training history of the weights.

Each decision is written to `<stage>/skipped.json` before the next step, and a checkpoint's manifest lists the batches
skipped before it. Therefore a run that is killed and resumed skips the same batches, even if their loss would be finite
the second time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from titan_cpt.common.files import write_text_atomically
from titan_cpt.common.reading import matching, read_text
from titan_cpt.common.run_folder import SKIPPED_FILE
from titan_cpt.errors import CheckpointError


class SkippedBatches:
    """The skipped batches of one run, by stage and 0-based step.

    Args:
        run: the run's folder; the decisions of earlier sessions are read from it.
        writing: whether this rank writes decisions.

    Raises:
        CheckpointError: a skipped.json is damaged.
        AccessError: a skipped.json cannot be read.
    """

    def __init__(self, run: Path, *, writing: bool) -> None:
        self._run = run
        self._writing = writing
        self._known: dict[str, dict[int, Any]] = {}
        for path in matching(run, "*", SKIPPED_FILE):
            self._known[path.parent.name] = _read(path)

    def restore(self, recorded: Any) -> None:
        """Add the skipped steps, by stage, that a checkpoint's manifest lists."""
        for stage, steps in (recorded if isinstance(recorded, Mapping) else {}).items():
            known = self._known.setdefault(str(stage), {})
            for step in steps:
                known.setdefault(int(step), {})

    def add(self, stage: str, step: int, **details: Any) -> None:
        """Skip a batch from now on; on the writing rank the decision is on the disk when this returns."""
        known = self._known.setdefault(stage, {})
        known[step] = details
        if self._writing:
            folder = self._run / stage
            folder.mkdir(exist_ok=True)
            write_text_atomically(
                folder / SKIPPED_FILE, json.dumps({str(s): known[s] for s in sorted(known)}, indent=1)
            )

    def contains(self, stage: str, step: int) -> bool:
        """Whether the batch is skipped."""
        return step in self._known.get(stage, {})

    def in_warm_up(self, stage: str, step: int) -> bool:
        """Whether the batch was bad while the optimizer state was warmed up, so that warming up again skips it too."""
        return "in_warm_up" in self._known.get(stage, {}).get(step, {})

    def count(self, stage: str, *, after: int, until: int) -> int:
        """How many batches of a stage are skipped at steps in (after, until]."""
        return sum(after < step <= until for step in self._known.get(stage, {}))

    def skipped_before(self, stages: Sequence[str], steps_done: int) -> dict[str, list[int]]:
        """The 0-based skipped steps by stage; of the last one in `stages` only those before `steps_done`."""
        skipped = {stage: sorted(self._known.get(stage, {})) for stage in stages}
        skipped[stages[-1]] = [step for step in skipped[stages[-1]] if step < steps_done]
        return {stage: steps for stage, steps in skipped.items() if steps}


def _read(path: Path) -> dict[int, Any]:
    try:
        return {int(step): details for step, details in json.loads(read_text(path)).items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error}. It lists the skipped batches; restore it, or remove it "
            f"together with the checkpoints of {path.parent.name!r} to train that stage again"
        ) from None
