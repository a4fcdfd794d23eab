"""Batches that are passed over because their numbers were bad: a part of the weights' past, so kept like one.

A decision is on the disk, in `<stage>/skipped.json`, before a step is taken after it; a checkpoint's manifest holds
those that its weights went through. A run that is killed and goes on therefore passes over the same batches, whether
or not what spoilt them comes again.
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


class Skips:
    """The batches of one run that are passed over, by stage and 0-based step.

    Args:
        run: the run's folder, whose stages' decisions are read.
        writing: whether this rank writes new ones.

    Raises:
        CheckpointError: what is there is damaged.
        AccessError: the system does not let it be read.
    """

    def __init__(self, run: Path, *, writing: bool) -> None:
        self._run, self._writing = run, writing
        self._known: dict[str, dict[int, Any]] = {}
        for path in matching(run, "*", SKIPPED_FILE):
            self._known[path.parent.name] = _read(path)

    def recall(self, recorded: Any) -> None:
        """Take up what a checkpoint's manifest says of its past: steps by stage."""
        for stage, steps in (recorded if isinstance(recorded, Mapping) else {}).items():
            known = self._known.setdefault(str(stage), {})
            for step in steps:
                known.setdefault(int(step), {})

    def add(self, stage: str, step: int, **told: Any) -> None:
        """Pass over a batch from now on; on the disk when this returns."""
        known = self._known.setdefault(stage, {})
        known[step] = told
        if self._writing:
            folder = self._run / stage
            folder.mkdir(exist_ok=True)
            write_text_atomically(
                folder / SKIPPED_FILE, json.dumps({str(s): known[s] for s in sorted(known)}, indent=1)
            )

    def holds(self, stage: str, step: int) -> bool:
        """Whether the batch is passed over."""
        return step in self._known.get(stage, {})

    def count(self, stage: str, *, after: int, until: int) -> int:
        """How many batches of a stage are passed over at steps in (after, until]."""
        return sum(after < step <= until for step in self._known.get(stage, {}))

    def past(self, stages: Sequence[str], steps_done: int) -> dict[str, list[int]]:
        """What belongs to the past of weights that took `stages`, of the last one so many steps."""
        found = {stage: sorted(self._known.get(stage, {})) for stage in stages}
        found[stages[-1]] = [step for step in found[stages[-1]] if step < steps_done]
        return {stage: steps for stage, steps in found.items() if steps}


def _read(path: Path) -> dict[int, Any]:
    try:
        return {int(step): told for step, told in json.loads(read_text(path)).items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error}. It says which batches are passed over; restore it, or remove it "
            f"together with the checkpoints of {path.parent.name!r} to train that stage again"
        ) from None
