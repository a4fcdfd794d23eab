"""The sections of the HTML report, in the order of the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from titan_cpt.reporting.comparison import compare
from titan_cpt.reporting.curve_sections import (
    forgetting_section,
    loss_curves_section,
    schedules_section,
    sources_section,
    training_section,
)
from titan_cpt.reporting.html_parts import Section
from titan_cpt.reporting.loss_sections import (
    benchmark_sections,
    final_losses_section,
    stages_section,
    trade_off_section,
)
from titan_cpt.reporting.run_log import RunLog
from titan_cpt.reporting.run_sections import (
    checkpoints_section,
    data_section,
    provenance_section,
    sessions_section,
    throughput_section,
)


def sections(runs: Sequence[RunLog]) -> Iterator[Section]:
    """All sections; one that has nothing to show is omitted."""
    rows = compare(runs)
    yield final_losses_section(rows)
    yield from loss_curves_section(runs)
    yield from stages_section(runs)
    yield from forgetting_section(runs)
    yield from trade_off_section(rows, runs)
    yield from training_section(runs)
    yield from sources_section(runs)
    yield from schedules_section(runs)
    yield from benchmark_sections(runs)
    yield from data_section(runs)
    yield from sessions_section(runs)
    yield from throughput_section(runs)
    yield from checkpoints_section(runs)
    yield provenance_section(runs)
