"""Compare the speed of titan_cpt and other trainers on the same work, on a CPU or on one GPU.

    python scripts/bench/speed/race.py --peers .venv-bench/bin/python [--quick] [--write]          # A, B, B32, C
    python scripts/bench/speed/race.py --races G405,L1B,W4096,Q --json races.json [--write]        # on one GPU
    python scripts/bench/speed/race.py --device cuda --dry-run                    # tiny shapes on a CPU, no figures

Every trainer is a process that stays alive: it loads the same weights and takes the same batches in the same order, in
the same precision. They take turns (A B C A B C ...), so that other work on the machine affects all equally; figures
are medians over the turns. The first losses must agree, otherwise nothing is written. MFU is relative to a matrix
product in the same turns (2048^3, on CUDA 8192^3), and on CUDA to the data sheet's peak.

On a CPU every trainer has one thread, pinned to the core CORE (default 0). On CUDA nothing is pinned, one trainer at a
time computes, the clock waits for the device, and memory is that of the device (contest.py says how trainers share it).
A trainer that is not installed or fails is named in the table. Exit status: 1 if one failed or its loss disagrees.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import goals
import report
from contest import Entry, Settings, race
from shapes import COMPILED, PEERS, RACES, VARIANTS, Race, tiny

KINDS = ("hf_trainer", "litgpt", "plain", "torchtitan")
SHM_NEEDED_BYTES = 24 << 30  # weights of the largest shape, twice, and room for the trainers' own files


def main(words: list[str]) -> int:
    """Run the selected shapes; print and write the tables."""
    options = parsed(words)
    results: list[dict[str, Any]] = []
    settings = settings_of(options)
    if settings.device == "cpu" and not options.dry_run and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(os.environ.get("CORE", "0"))})
    for key in options.races:
        spec = tiny(RACES[key]) if options.dry_run else RACES[key]
        spec = with_options(spec, options)
        print(f"shape {key}", file=sys.stderr, flush=True)
        results.append(race(spec, entries_of(spec, options), settings))
        print(report.table(results[-1]) + "\n", flush=True)
    return finish(options, results)


def parsed(words: list[str]) -> argparse.Namespace:
    """The options, checked, with `races` as a list and `device` decided."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=sys.executable, help="Python of the other trainers (default: this one)")
    parser.add_argument("--wheels", default="", help="folder of packages unpacked for the other trainers")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: that of the first race, else cpu")
    parser.add_argument("--races", default="", help="shapes, comma-separated: " + ", ".join(RACES))
    parser.add_argument(
        "--only", default="", help=f"only these other trainers, comma-separated: {', '.join(KINDS)}; or none"
    )
    parser.add_argument("--variants", default="", help=f"of titan_cpt, comma-separated: {', '.join(VARIANTS)}")
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME:KEY=VALUE,...", help="a further variant of titan_cpt"
    )
    parser.add_argument(
        "--baseline", type=Path, help="checkout of another commit of titan_cpt: takes part, eager and compiled"
    )
    parser.add_argument("--turns", type=int, default=5, help="turns of each trainer (default 5)")
    parser.add_argument("--steps", type=int, help="timed steps a turn (default 3 on a CPU, 8 on CUDA, Q 50)")
    parser.add_argument("--batch", type=int, help="sequences a step (default: the shape's)")
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="seconds a race may take: fewer turns and trainers"
    )
    parser.add_argument("--patience", type=float, default=900.0, help="seconds until a silent trainer is ended")
    parser.add_argument(
        "--parallel",
        type=int,
        default=1,
        help="trainers that load and compile at the same time on CUDA (default 1): the start is shorter, but kernels "
        "that a compiler chooses by timing them may be chosen less well",
    )
    parser.add_argument("--quick", action="store_true", help="A and B in 3 turns")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU, uncompiled: no figure counts")
    parser.add_argument(
        "--write", type=Path, nargs="?", const=Path(), help="replace the tables of a page (default: the device's)"
    )
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args(words)
    named = ["A", "B"] if options.quick else [key for key in options.races.split(",") if key]
    if unknown := [key for key in named if key not in RACES]:
        parser.error(f"unknown race {', '.join(unknown)}: choose from {', '.join(RACES)}")
    options.device = options.device or (RACES[named[0]].device if named else "cpu")
    options.races = named or [key for key, spec in RACES.items() if spec.device == options.device]
    large = [key for key in options.races if RACES[key].device == "cuda"]
    if options.device == "cpu" and large and not options.dry_run:
        parser.error(f"{', '.join(large)}: meant for a GPU; on a CPU only with --dry-run")
    if unknown := [name for name in options.variants.split(",") if name and name not in VARIANTS]:
        parser.error(f"unknown variant {', '.join(unknown)}: choose from {', '.join(VARIANTS)}, or define --variant")
    if unknown := [name for name in options.only.split(",") if name not in ("", "none", *KINDS)]:
        parser.error(f"unknown trainer {', '.join(unknown)}: choose from {', '.join(KINDS)}, none")
    if min(options.turns, options.steps or 1, options.parallel) < 1 or options.steps == 0:
        parser.error("--turns, --steps and --parallel must be at least 1")
    if options.baseline and not (options.baseline / "titan_cpt" / "train.py").is_file():
        parser.error(f"--baseline {options.baseline}: not a checkout of titan_cpt, it has no titan_cpt/train.py")
    if options.quick:
        options.turns = 3
    if options.dry_run:
        options.turns = min(options.turns, 2)
    return options


def settings_of(options: argparse.Namespace) -> Settings:
    """What holds for all races. In a dry run the processes run on a CPU."""
    cuda = options.device == "cuda" and not options.dry_run
    memory = Path("/dev/shm")
    roomy = cuda and memory.is_dir() and shutil.disk_usage(memory).free > SHM_NEEDED_BYTES
    return Settings(
        device="cuda" if cuda else "cpu",
        target=options.device,
        peers=options.peers,
        wheels=str(Path(options.wheels).resolve()) if options.wheels else "",
        turns=options.turns,
        dry_run=options.dry_run,
        budget_s=options.budget,
        patience_s=options.patience,
        parallel=options.parallel,
        folder=memory if roomy else None,
    )


def with_options(spec: Race, options: argparse.Namespace) -> Race:
    """The shape with the batch, the steps and the variants of the command line."""
    variants = tuple(name for name in options.variants.split(",") if name) or spec.variants
    steps = options.steps if options.steps and not options.dry_run else spec.steps_a_turn
    batch = options.batch if options.batch and not options.dry_run else spec.batch
    return replace(spec, variants=variants, steps_a_turn=steps, batch=batch)


def entries_of(spec: Race, options: argparse.Namespace) -> list[Entry]:
    """The contestants in the order of their start: if --budget cuts the list short, the last ones do not run.

    On CUDA the goals' contestants come first: titan_cpt's first variant, then another build as the quick start runs it,
    or the first two trainers.
    """
    allocator = options.device == "cpu"  # keep_freed_memory, which `titan-cpt train` calls, concerns a CPU's memory
    variants = {name: VARIANTS[name] for name in spec.variants}
    for text in options.variant:
        name, _, pairs = text.partition(":")
        variants[name] = dict(pair.split("=", 1) for pair in pairs.split(",") if pair)
    ours = [
        Entry(
            "titan_cpt" if name == "eager" else f"titan_cpt, {name}", "ours", name, allocator=allocator, overrides=keys
        )
        for name, keys in variants.items()
    ]
    entries, builds = [], []
    if options.baseline:
        source = str(options.baseline.resolve())
        builds = [
            Entry(f"baseline build, {name}", "ours", f"baseline-{name}", overrides=overrides, source=source)
            for name, overrides in (("eager", {}), ("compiled", COMPILED))
        ]
    chosen = options.only.split(",") if options.only else KINDS
    for name in spec.peers:
        kind, compiled, tuned = PEERS[name]
        if kind in chosen:
            entries.append(Entry(name, kind, compiled=compiled, allocator=tuned))
    if options.device == "cuda":
        return [*ours[:1], *builds[:1], *entries[:2], *ours[1:], *builds[1:], *entries[2:]]
    return [*ours, *builds, *entries]


def finish(options: argparse.Namespace, results: list[dict[str, Any]]) -> int:
    """Write the JSON file and the page, print the goals; returns the exit status."""
    result: dict[str, Any] = {
        "device": options.device,
        "machine": report.machine(options.device),
        "commit": report.commit(),
        "baseline": report.commit(options.baseline) if options.baseline else None,
        "date": datetime.date.today().isoformat(),
        "dry_run": options.dry_run,
        "command": sys.argv[1:],
        "races": results,
        "goals": goals.verdicts(results, dry_run=options.dry_run) if options.device == "cuda" else [],
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.device == "cuda":
        print(goals.table(result["goals"]))
    wrong = [f"{race['key']}: {row['name']}: {row['reason']}" for race in results for row in failed(race)]
    if wrong:
        print("\n".join(["these trainers have no valid figures:", *wrong]), file=sys.stderr)
    if options.write is not None:
        if wrong or options.dry_run:
            print("no page was written", file=sys.stderr)
        else:
            target = options.write if options.write != Path() else report.PAGES[options.device]
            report.write_into(target, report.page(result))
    return int(bool(wrong))


def failed(race_result: dict[str, Any]) -> list[dict[str, Any]]:
    """Contestants that failed or did other work. Not installed, not supported and out of budget are no failures."""
    return [row for row in race_result["contestants"] if row["status"] in ("failed", "disagrees", "out of memory")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
