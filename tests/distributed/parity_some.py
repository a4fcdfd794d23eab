"""Runs only the layouts whose names have all the given words, and compares them with one process.

    python tests/distributed/parity_some.py smollm3 tp_2

`test_parity.py` runs all of them, which takes minutes. Exit status 1: a number differs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # as pytest's pythonpath

from parity_launch import launch, make_inputs  # noqa: E402
from parity_layouts import CASES, LENGTHS, QUICKSTART, REFERENCES  # noqa: E402
from test_parity import faults_of  # noqa: E402


def main(words: list[str]) -> int:
    """Train the references and the chosen cases in a temporary folder; print each case and what differs."""
    every = [case for case in (*CASES, *LENGTHS, *QUICKSTART) if case.runs_here]
    chosen = [case for case in every if all(word in case.name for word in words)]
    if not words or not chosen:
        print("No layout has all these words in its name. The layouts:", *(case.name for case in every), sep="\n  ")
        return 2
    references = sorted({case.against for case in chosen})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        launch(folder, [{"job.name": one, **REFERENCES[one]} for one in references], 1)
        for world_size in sorted({case.world_size for case in chosen}):
            runs = [{"job.name": case.name, **case.overrides} for case in chosen if case.world_size == world_size]
            launch(folder, runs, world_size, f"of-{world_size}")
        faults = {case.name: faults_of(case, folder) for case in chosen}
    for name, found in faults.items():
        print(f"{name}: {'the numbers of one process' if not found else ''}", *found, sep="\n  " if found else "")
    return 1 if any(faults.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
