"""The paper's claims on real text and a small model: data, arms, tables, verdicts. run.sh calls this.

    python scripts/reproduce/reproduce.py --quick          # three claims, one seed: 6 minutes on two cores
    python scripts/reproduce/reproduce.py                  # all claims, three seeds: about 2 1/2 hours
    python scripts/reproduce/reproduce.py --tables-only    # from what is in docs/reproduction already

Times are those of two cores with instructions for bfloat16 (AMX); without them it takes about four times as long.
Every arm that is done leaves its metrics, thinned, in docs/reproduction/SWEEP/ARM. Arms found there are not trained
again, on whatever machine; commit the folder and go on elsewhere. All arms get a seed before any gets one more.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from verdicts import Claim, End, Finding, Runs, claims, judge, verdict_on

from titan_cpt.reporting.comparison import compare
from titan_cpt.reporting.run_log import RunLog, read_run
from titan_cpt.runs.sweep_runs import SweepRun, read_sweep_runs

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DATA = Path("data/reproduce")  # below the working directory, as in the configs
QUICK = ("quick_union", "quick_replay", "quick_constant")
FULL = (
    *("union", "replay", "constant", "peak", "warmup", "same", "infinite", "splits_cosine", "splits_infinite"),
    *("weak", "mixed", "domains"),
)
TOKENIZER_ENTRIES, TOKENIZER_BYTES = 4096, 12_000_000
STEPS_BETWEEN_KEPT = 20
_EVENTS = ("start", "adopt", "transition", "validation_changed")
_TITAN = (sys.executable, "-m", "titan_cpt")


def main() -> int:
    """Data, arms, tables; 1 where an arm failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three claims, one seed")
    parser.add_argument("--archive", type=Path, help="of the novels, in place of the network: see fetch_novels.py")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="arms at once (default 2)")
    parser.add_argument("--arms", type=int, metavar="N", help="stop after so many arms; the same command goes on")
    parser.add_argument("--launch", metavar="COMMAND", help="what trains an arm (default: titan-cpt train)")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "reproduction", metavar="FOLDER")
    parser.add_argument("--tables-only", action="store_true", help="train nothing")
    options = parser.parse_args()
    sweeps = QUICK if options.quick else FULL
    failed = 0
    if not options.tables_only:
        make_data(options.archive, manuals=not options.quick)
        failed = run(sweeps, options.results, jobs=options.jobs, most=options.arms, launch=options.launch)
    prefix = "quick_" if options.quick else ""
    text = tables(claims(prefix), results(options.results, sweeps))
    options.results.mkdir(parents=True, exist_ok=True)
    out = options.results / ("quick.md" if options.quick else "full.md")
    out.write_text(text)
    print(text, f"written to {out}", sep="\n")
    return 1 if failed else 0


def make_data(archive: Path | None, *, manuals: bool) -> None:
    """Text, tokenizer and tokens, each only where it is missing."""
    fetch = [sys.executable, str(HERE / "fetch_novels.py"), str(DATA)]
    subprocess.run([*fetch, *(["--archive", str(archive)] if archive else [])], check=True)
    tokenizer = DATA / "tokenizer.json"
    if not tokenizer.exists():
        sample = DATA / "tokenizer-sample.jsonl"
        sample.write_text(first_lines(DATA / "english.jsonl", TOKENIZER_BYTES))
        words = ["prepare", "--input", str(sample), "--train-tokenizer", str(TOKENIZER_ENTRIES), "--output"]
        subprocess.run([*_TITAN, *words, str(tokenizer)], check=True)
    parts = [f"{language}{part}" for language in ("english", "german") for part in ("", "-heldout")]
    for part in parts:
        _prepare(DATA / f"{part}.jsonl", DATA / part, tokenizer)
    if manuals:
        text = Path("data/quickstart/english.jsonl")
        if not text.exists():
            subprocess.run([sys.executable, str(ROOT / "scripts" / "fetch_quickstart.py")], check=True)
        _prepare(text, DATA / "manuals", tokenizer, "--holdout", "0.05")


def _prepare(text: Path, prefix: Path, tokenizer: Path, *more: str) -> None:
    if not prefix.with_suffix(".idx").exists():
        words = ["prepare", "--input", str(text), "--output", str(prefix), "--tokenizer", str(tokenizer), *more]
        subprocess.run([*_TITAN, *words], check=True)


def first_lines(path: Path, most_bytes: int) -> str:
    """The lines that lie whole in a file's first bytes."""
    with path.open("rb") as file:
        return file.read(most_bytes).rpartition(b"\n")[0].decode() + "\n"


def run(sweeps: tuple[str, ...], results: Path, *, jobs: int, most: int | None, launch: str | None) -> int:
    """Train the arms that have no result yet, `jobs` at once, and keep what each one measured; how many failed."""
    files = [HERE / "configs" / f"{name}.toml" for name in sweeps]
    arms = read_sweep_runs(files)
    broken = [arm for arm in arms if not isinstance(arm, SweepRun)]
    if broken:
        raise SystemExit(f"{broken[0].name}: {broken[0].problem}")
    waiting = in_turn([(number, arm) for number, arm in enumerate(arms) if not has_result(arm, results)])
    print(f"{len(arms)} arms, {len(arms) - len(waiting)} of them done", flush=True)

    def one(number: int, arm: SweepRun) -> bool:
        words = [*_TITAN, "sweep", *map(str, files), "--index", str(number)]
        words += ["--launch", launch or shlex.join([*_TITAN, "train"])]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            keep(arm.folder, result_folder(arm, results))
        said = (
            "done" if done.returncode == 0 else f"failed ({done.returncode}): {done.stdout[-500:]}{done.stderr[-500:]}"
        )
        print(f"[{number + 1}/{len(arms)}] {arm.folder}: {said}", flush=True)
        return done.returncode == 0

    with ThreadPoolExecutor(jobs) as pool:
        return sum(not good for good in pool.map(lambda each: one(*each), waiting[:most]))


def in_turn(arms: list[tuple[int, SweepRun]]) -> list[tuple[int, SweepRun]]:
    """The first seed of every arm, then the second of every arm ...: a set stopped early has as much on every claim."""
    return sorted(arms, key=lambda each: each[1].config.job.seed)


def result_folder(arm: SweepRun, results: Path) -> Path:
    """Where an arm's result lies: SWEEP/ARM."""
    return results / arm.folder.parent.name / arm.folder.name


def has_result(arm: SweepRun, results: Path) -> bool:
    """Whether there is a result of this very plan."""
    path = result_folder(arm, results) / "plan.json"
    return path.exists() and json.loads(path.read_text())["fingerprint"] == arm.plan.fingerprint


def keep(run_folder: Path, out: Path) -> None:
    """A run's plan and metrics, the latter thinned: all measurements, every 20th step, what begins a stage."""
    record = read_run(run_folder)
    out.mkdir(parents=True, exist_ok=True)
    trains = [
        {key: value for key, value in line.items() if key != "batch_hash"}
        for line in record.trains
        if line["step"] % STEPS_BETWEEN_KEPT == 0
    ]
    events = [event for event in record.events if event["name"] in _EVENTS]
    lines = [*events, *trains, *record.validations, *record.renewed]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / "plan.json").write_text(json.dumps(record.plan, indent=1))  # last: with it the result is there


def results(folder: Path, sweeps: tuple[str, ...]) -> Runs:
    """What every arm with a result came to, by (sweep/arm without its seed, seed)."""
    found: dict[tuple[str, int], End] = {}
    for path in sorted(path for name in sweeps for path in folder.glob(f"{name}/*/plan.json")):
        record = read_run(path.parent)
        sweep, arm = path.parent.parent.name, path.parent.name
        seed = re.search(r"_?seed-(\d+)$", arm)
        name = arm[: seed.start()] if seed else arm
        number = int(seed[1]) if seed else 0
        found[f"{sweep}/{name or sweep}", number] = end_of(record)
        if name == "fraction-0" and sweep in ("replay", "quick_replay"):
            found["english/english", number] = end_of_first_stage(record)
    return found


def end_of(record: RunLog) -> End:
    """The final losses, forgetting, and the highest rise of English within a later stage."""
    (row,) = compare([record])
    forgetting = row.forgetting.get("english", math.nan)
    return End(dict(row.losses), forgetting, highest_rise(record))


def end_of_first_stage(record: RunLog) -> End:
    """As `end_of`, had the run ended with its first stage."""
    plan = {**record.plan, "stages": record.plan["stages"][:1]}
    name = plan["stages"][0]["name"]
    lines = [line for line in record.validations if line["stage"] == name]
    return end_of(RunLog(record.name, record.folder, plan, [], lines, []))


def highest_rise(record: RunLog) -> float:
    """The most that the loss on English rose, within a stage behind the first, above where that stage began."""
    rises = [0.0]
    for stage in record.plan["stages"][1:]:
        losses = {
            line["step"]: line["loss_nats_per_token"]
            for line in record.validations
            if line["stage"] == stage["name"] and line["dataset"] == "english"
        }
        rises.append(max(losses.values()) - losses[0])
    return max(rises)


def tables(asked: list[Claim], runs: Runs) -> str:
    """Verdicts, the findings behind them, and every arm's mean and standard error over its seeds, as Markdown."""
    lines = ["| claim | | verdict |", "|---|---|---|"]
    behind = [
        "| claim | difference | nats per token | standard error | allowed | seeds | |",
        "|---|---|---|---|---|---|---|",
    ]
    for claim in asked:
        findings = [judge(part, runs) for part in claim.parts]
        lines.append(f"| {claim.name} | {claim.statement} | **{verdict_on(findings)}** |")
        behind += [_row(claim, finding) for finding in findings]
    datasets = sorted({name for end in runs.values() for name in end.losses})
    arms = [f"| arm | {' | '.join(datasets)} | AVG | forgetting | seeds |", "|---" * (len(datasets) + 4) + "|"]
    for name in sorted({name for name, _ in runs}):
        ends = [end for (of, _), end in runs.items() if of == name]
        cells = [_mean([end.losses[dataset] for end in ends if dataset in end.losses]) for dataset in datasets]
        cells += [_mean([end.average for end in ends]), _mean([end.forgetting for end in ends])]
        arms.append(f"| {name} | {' | '.join(cells)} | {len(ends)} |")
    return "\n".join([*lines, "", *behind, "", *arms, ""])


def _row(claim: Claim, finding: Finding) -> str:
    error = "" if finding.error is None else f"{finding.error:.4f}"
    rule = {"above": "> 0", "within": f"<= {finding.margin:.4f}", "level": f"+-{finding.margin:.4f}"}[finding.part.rule]
    value = "" if math.isnan(finding.difference) else f"{finding.difference:+.4f}"
    cells = [claim.name, finding.part.what, value, error, rule, str(finding.seeds), finding.verdict]
    return f"| {' | '.join(cells)} |"


def _mean(values: list[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return ""
    middle = sum(known) / len(known)
    if len(known) == 1:
        return f"{middle:.4f}"
    spread = math.sqrt(sum((value - middle) ** 2 for value in known) / (len(known) - 1) / len(known))
    return f"{middle:.4f} ± {spread:.4f}"


if __name__ == "__main__":
    sys.exit(main())
