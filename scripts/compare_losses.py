"""Compare the losses of runs of the same config: the largest difference between the first run and each other run.

    python scripts/compare_losses.py outputs/one outputs/two [...] [--tolerance 1e-3]

Exit status 1 if a loss differs by more than the tolerance, a batch hash differs, or a line is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def lines_of(run: Path, kind: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The lines of one kind by stage, step and dataset; the last one if a resume wrote a line again."""
    found = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return {(line["stage"], line["step"], line.get("dataset")): line for line in found if line["kind"] == kind}


def compare_runs(first: Path, other: Path) -> tuple[list[str], float]:
    """Cells of the table's row, and the largest difference of a loss: infinite if steps or batches differ."""
    train = lines_of(first, "train")
    theirs = lines_of(other, "train")
    measured = lines_of(first, "validation")
    their_measured = lines_of(other, "validation")
    if train.keys() != theirs.keys() or measured.keys() != their_measured.keys():
        return [other.name, "different steps or validations"], float("inf")
    same = all(train[key]["batch_hash"] == theirs[key]["batch_hash"] for key in train)
    losses = largest(train, theirs, "loss_nats_per_token")
    validation = largest(measured, their_measured, "loss_nats_per_token")
    norms = max(abs(theirs[key]["grad_norm"] / train[key]["grad_norm"] - 1) for key in train)
    cells = [other.name, str(len(train)), "the same" if same else "DIFFERENT"]
    cells += [f"{losses:.1e}", f"{norms:.1e}", f"{validation:.1e}"]
    return cells, max(losses, validation) if same else float("inf")


def largest(ours: dict[tuple[Any, ...], Any], theirs: dict[tuple[Any, ...], Any], key: str) -> float:
    """The largest difference of a number between lines of the same stage, step and dataset."""
    return max((abs(line[key] - theirs[of][key]) for of, line in ours.items()), default=0.0)


def main(arguments: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders; the others are compared with the first")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="nats per token (default 1e-3)")
    options = parser.parse_args(arguments)
    print(
        f"| compared with {options.runs[0].name} | steps | batches | training loss | gradient norm | validation loss |"
    )
    print("|---|---|---|---|---|---|")
    worst = 0.0
    for run in options.runs[1:]:
        cells, difference = compare_runs(options.runs[0], run)
        print("| " + " | ".join(cells) + " |")
        worst = max(worst, difference)
    return int(worst > options.tolerance)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
