"""Compares what runs of the same config measured: the largest differences between the first one and each of the others.

    python scripts/compare_losses.py outputs/one outputs/two [...] [--tolerance 1e-3]

Exit status 1 where a loss is farther off than the tolerance, a batch is another one, or a line is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def lines_of(run: Path, kind: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The lines of one kind by stage, step and dataset; of what was written twice, the last."""
    found = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return {(line["stage"], line["step"], line.get("dataset")): line for line in found if line["kind"] == kind}


def verify_against_transformers(first: Path, other: Path) -> tuple[list[str], float]:
    """Cells of the table's row, and the largest difference of a loss; infinite where the runs are not of one kind."""
    train, theirs = lines_of(first, "train"), lines_of(other, "train")
    measured, their_measured = lines_of(first, "validation"), lines_of(other, "validation")
    if train.keys() != theirs.keys() or measured.keys() != their_measured.keys():
        return [other.name, "other steps or measurements"], float("inf")
    same = all(train[key]["batch_hash"] == theirs[key]["batch_hash"] for key in train)
    losses = largest(train, theirs, "loss_nats_per_token")
    validation = largest(measured, their_measured, "loss_nats_per_token")
    norms = max(abs(theirs[key]["grad_norm"] / train[key]["grad_norm"] - 1) for key in train)
    cells = [other.name, str(len(train)), "the same" if same else "OTHERS"]
    cells += [f"{losses:.1e}", f"{norms:.1e}", f"{validation:.1e}"]
    return cells, max(losses, validation) if same else float("inf")


def largest(ours: dict[tuple[Any, ...], Any], theirs: dict[tuple[Any, ...], Any], key: str) -> float:
    """The largest difference of a number between lines of the same place."""
    return max((abs(ours[place][key] - theirs[place][key]) for place in ours), default=0.0)


def main(arguments: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs; the first is what the others are held to")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="nats per token")
    asked = parser.parse_args(arguments)
    print(f"| against {asked.runs[0].name} | steps | batches | training loss | gradient norm | validation loss |")
    print("|---|---|---|---|---|---|")
    worst = 0.0
    for run in asked.runs[1:]:
        cells, difference = verify_against_transformers(asked.runs[0], run)
        print("| " + " | ".join(cells) + " |")
        worst = max(worst, difference)
    return int(worst > asked.tolerance)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
