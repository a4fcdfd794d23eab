"""scripts/bench/quickstart.py: the phases of a run, and whether its losses show what the quick start claims."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts/bench/quickstart.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("bench_quickstart", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def stages(forgotten: float, german: float) -> list[dict[str, Any]]:
    """The summary of a run whose English was at 4 and whose German was at 7 nats before its second stage."""
    second = {
        "before": {"english": 4.0, "german": 7.0},
        "after": {"english": 4.0 + forgotten, "german": german},
        "bits_per_byte": {"english": 1.5, "german": 2.0},
        "forgetting": {"english": forgotten},
    }
    return [{}, second]


def test_phases_add_up_to_the_run(bench) -> None:
    """Text that was not fetched takes no time: its seconds belong to the next phase."""
    ends = {"tokenizer, tokens, start": 112.0, "English": 142.0, "German": 182.0}

    assert list(bench.phase_seconds(100.0, ends).values()) == [0.0, 12.0, 30.0, 40.0]


@pytest.mark.parametrize(
    ("kept", "lost", "german", "missed"),
    [(0.6, 2.5, 4.0, 0), (0.61, 2.5, 4.0, 1), (0.6, 2.49, 4.0, 1), (0.6, 2.5, 4.01, 1), (1.0, 1.0, 6.0, 3)],
)
def test_each_inequality_is_reached_or_missed_by_itself(bench, kept, lost, german, missed) -> None:
    """German falls by at least 3; English forgets at most 0.6 with replay and at least 2.5 without."""
    runs = {"this checkout": stages(kept, german), "this checkout, no replay": stages(lost, 3.0)}

    assert bench.loss_table(runs)[-1].count("MISSED") == missed


def test_the_ratio_is_the_median_of_the_turns_ratios(bench) -> None:
    """Turns of 100 s against 30, 50 and 20: 0.3, within the goal."""

    def turn(seconds: float) -> dict[str, float]:
        return dict.fromkeys((phase for phase, _ in bench.PHASES), seconds / len(bench.PHASES))

    taken = {"baseline": [turn(100)] * 3, "this checkout": [turn(30), turn(50), turn(20)]}

    assert bench.time_table(taken)[-1] == "this checkout / baseline: 0.300 (reached: at most 0.4)"
