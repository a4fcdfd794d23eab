"""Time the quick start, from an empty folder to its last table, and print what it shows; beside another checkout's.

    python scripts/bench/quickstart.py [--baseline FOLDER] [--turns 1] [--text FOLDER] [--KEY VALUE ...]

Every turn starts `run_train.sh` of each checkout in an empty folder, one after the other, and the two swap places from
turn to turn. Each run fetches the text, trains the tokenizer, prepares the tokens and trains both stages. After the
turns, this checkout trains once more without replay, on the tokens of its last run. Prints two tables: medians of wall
seconds by phase, and losses. --text copies english.jsonl and german.jsonl from FOLDER instead of fetching them. Other
options override config keys in all runs: --stages.english.steps 2 --stages.german.steps 2 tries everything out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PHASES = (
    ("text", "fetch_quickstart: done"),
    ("tokenizer, tokens, start", "stage english begins"),
    ("English", "stage german begins"),
    ("German", ""),
)
"""Name of each phase, and what the first line after it contains; the last one ends with the process."""
GOAL_RATIO = 0.4


@dataclass(frozen=True)
class Build:
    """A checkout, and the environment whose packages it runs with."""

    label: str
    folder: Path
    environment: Path

    def run(self, where: Path, overrides: Sequence[str]) -> dict[str, float]:
        """Run the quick start in the folder `where`; returns the wall seconds of each phase."""
        variables = {**os.environ, "VIRTUAL_ENV": str(self.environment), "PYTHONPATH": str(self.folder)}
        began = time.perf_counter()
        process = subprocess.Popen(
            [self.folder / "run_train.sh", *overrides],
            cwd=where,
            env=variables | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None, "it was started with a pipe"
        lines, ends = [], {}
        for line in process.stdout:
            lines.append(line)
            ends |= {phase: time.perf_counter() for phase, sign in PHASES if sign and sign in line}
        if process.wait():
            sys.exit("".join(lines[-20:]) + f"{self.label}: exit status {process.returncode}")
        ends[PHASES[-1][0]] = time.perf_counter()
        return phase_seconds(began, ends)


def phase_seconds(began: float, ends: Mapping[str, float]) -> dict[str, float]:
    """The seconds between the ends of the phases; a phase that did not happen took none."""
    seconds = {}
    for phase, _ in PHASES:
        seconds[phase] = ends.get(phase, began) - began
        began = ends.get(phase, began)
    return seconds


def main() -> None:
    """Run the turns and print the tables."""
    options, overrides = parsed()
    builds = [Build("this checkout", ROOT, options.environment)]
    if options.baseline is not None:
        builds.insert(0, Build("baseline", options.baseline, options.baseline_environment or options.environment))
    taken: dict[str, list[dict[str, float]]] = {build.label: [] for build in builds}
    stages: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="quickstart-") as name:
        for turn in range(options.turns):
            for build in builds[:: -1 if turn % 2 else 1]:
                where = Path(name) / f"{turn}-{build.label.replace(' ', '-')}"
                copy_text(options.text, where)
                taken[build.label].append(build.run(where, overrides))
                print(f"turn {turn + 1}, {build.label}: {sum(taken[build.label][-1].values()):.1f} s", flush=True)
                stages[build.label] = stages_of(where / "outputs/quickstart")
        last = Path(name) / f"{options.turns - 1}-this-checkout"
        without = ["--job.name", "no_replay", "--stages.german.replay.fraction", "0"]
        builds[-1].run(last, [*overrides, *without])
        stages["this checkout, no replay"] = stages_of(last / "outputs/no_replay")
    print("\n".join(["", machine(), "", *time_table(taken), "", *loss_table(stages)]))


def parsed() -> tuple[argparse.Namespace, list[str]]:
    """The options, and those that override config keys."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=lambda text: Path(text).resolve(), metavar="FOLDER", help="other checkout")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="has english.jsonl and german.jsonl")
    own = Path(sys.prefix)
    parser.add_argument("--environment", type=Path, default=own, metavar="VENV", help="default: this Python's")
    parser.add_argument("--baseline-environment", type=Path, metavar="VENV", help="default: the same")
    return parser.parse_known_args()


def copy_text(text: Path | None, where: Path) -> None:
    """Make the folder of a run, with a copy of the text if there is one."""
    data = where / "data/quickstart"
    data.mkdir(parents=True)
    if text is not None:
        for name in ("english.jsonl", "german.jsonl"):
            shutil.copy(text / name, data / name)


def stages_of(run: Path) -> list[dict[str, Any]]:
    """The stages in a run's summary."""
    found: list[dict[str, Any]] = json.loads((run / "summary.json").read_text(encoding="utf-8"))["stages"]
    return found


def machine() -> str:
    """The processor, the cores that this process may use, and the load."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), model)
    except OSError:  # not Linux
        pass
    return f"{model}, {len(os.sched_getaffinity(0))} cores, load of the last 15 minutes {os.getloadavg()[2]:.1f}"


def time_table(taken: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """Medians over the turns; the ratio is the median of the turns' ratios."""
    names = [phase for phase, _ in PHASES]
    rows = [f"| wall seconds | whole | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for label, turns in taken.items():
        middle = [statistics.median(turn[name] for turn in turns) for name in names]
        whole = statistics.median(sum(turn.values()) for turn in turns)
        rows.append(f"| {label} | {whole:.1f} | " + " | ".join(f"{seconds:.1f}" for seconds in middle) + " |")
    if len(taken) == 2:
        pairs = zip(*taken.values(), strict=True)
        ratio = statistics.median(sum(ours.values()) / sum(theirs.values()) for theirs, ours in pairs)
        rows += ["", f"this checkout / baseline: {ratio:.3f} ({verdict(ratio <= GOAL_RATIO)}: at most {GOAL_RATIO})"]
    return rows


def loss_table(stages: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Validation losses after the last stage in nats per token, and whether they show what the quick start claims."""
    rows = [
        "| nats per token | English | forgotten | bits per byte | German before | after | bits per byte |",
        "|---" * 7 + "|",
    ]
    for label, (_, german) in stages.items():
        before, after, bits = german["before"], german["after"], german["bits_per_byte"]
        forgotten = german["forgetting"]["english"]
        cells = [
            f"{before['english']:.4f} -> {after['english']:.4f}",
            f"{forgotten:+.4f}",
            f"{bits['english']:.3f}",
            *(f"{losses['german']:.4f}" for losses in (before, after)),
            f"{bits['german']:.3f}",
        ]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    ours, without = stages["this checkout"][1], stages["this checkout, no replay"][1]
    fall = ours["before"]["german"] - ours["after"]["german"]
    kept, lost = ours["forgetting"]["english"], without["forgetting"]["english"]
    return [
        *rows,
        "",
        f"German falls by {fall:.2f} ({verdict(fall >= 3)}: at least 3); English forgets {kept:.2f} with replay "
        f"({verdict(kept <= 0.6)}: at most 0.6) and {lost:.2f} without ({verdict(lost >= 2.5)}: at least 2.5)",
    ]


def verdict(holds: bool) -> str:
    """A goal's state."""
    return "reached" if holds else "MISSED"


if __name__ == "__main__":
    main()
