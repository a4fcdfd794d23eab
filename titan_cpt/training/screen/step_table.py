"""The lines of training steps: a table whose every row fits 80 columns, whatever its numbers are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from titan_cpt.common import readable

ROWS_BETWEEN_HEADINGS = 20

_WIDTHS = {
    "step": 9,
    "loss": 7,
    "grad norm": 9,
    "LR": 8,
    "memory": 7,
    "tokens/s": 8,
    "MFU": 4,
    "ETA": 6,
    "of run": 6,
}


class StepTable:
    """Formats the rows of one stage; a heading is repeated every 20 rows. MFU has a column if it is known."""

    def __init__(self) -> None:
        self._rows = 0
        self._columns: tuple[str, ...] = ()

    def lines(self, line: Mapping[str, Any], stage_eta_s: float, run_eta_s: float) -> list[str]:
        """The row of a step, after a heading if one is due.

        Args:
            line: the step's line of metrics.jsonl.
            stage_eta_s: seconds until the stage ends; NaN if unknown.
        """
        cells = {
            "step": readable.steps(line["step"]),
            "loss": readable.loss(line["loss_nats_per_token"], 7),
            "grad norm": readable.significant(line["grad_norm"], 9),
            "LR": readable.scientific(line["lr"], 8),
            "memory": readable.memory(line.get("memory_gib", math.nan)),
            "tokens/s": readable.rate(line["tokens_per_s"]),
            "MFU": readable.share(line["mfu"]),
            "ETA": readable.duration(stage_eta_s),
            "of run": readable.duration(run_eta_s),
        }
        heading = []
        if self._rows % ROWS_BETWEEN_HEADINGS == 0:
            self._columns = tuple(name for name in _WIDTHS if name != "MFU" or not math.isnan(line["mfu"]))
            heading = ["  ".join(f"{name:>{_WIDTHS[name]}}" for name in self._columns)]
        self._rows += 1
        return [*heading, "  ".join(f"{cells[name]:>{_WIDTHS[name]}}" for name in self._columns)]
