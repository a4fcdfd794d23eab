"""Test the paper's claims on real text and a small model: data, sweep runs, tables, verdicts. run.sh calls this.

    python scripts/reproduce/reproduce.py --quick          # three claims, one seed: 6 minutes on two cores
    python scripts/reproduce/reproduce.py                  # all claims, three seeds: about 2 1/2 hours
    python scripts/reproduce/reproduce.py --averages       # averages and Reptile, three seeds: 20 minutes of one core
    python scripts/reproduce/reproduce.py --vocabulary     # an extended vocabulary, three seeds: 20 minutes of one core
    python scripts/reproduce/reproduce.py --tables-only    # from the results in docs/reproduction

Times are those of two cores with bfloat16 instructions (AMX); without them it takes about four times as long.
Every finished run leaves its thinned metrics in docs/reproduction/SWEEP/RUN. Runs found there are not trained again, on
any machine: commit the folder and continue elsewhere. Every run is trained with one seed before any gets a second seed.
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
from dataclasses import dataclass, replace
from pathlib import Path

from averages_claims import averages_claims
from make_vocabulary import make_vocabulary_data
from verdicts import Claim, End, Finding, Runs, claims, judge, verdict_on
from vocabulary_claims import vocabulary_claims

from titan_cpt.common.weights.named_weights import AVERAGE_SUFFIX
from titan_cpt.reporting.comparison import compare, with_averages
from titan_cpt.reporting.run_log import RunLog, read_run
from titan_cpt.runs.sweep_runs import SweepRun, read_sweep_runs

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DATA = Path("data/reproduce")  # in the working directory, as in the configs
QUICK = ("quick_union", "quick_replay", "quick_constant")
FULL = (
    *("union", "replay", "constant", "peak", "warmup", "same", "infinite", "splits_cosine", "splits_infinite"),
    *("weak", "mixed", "domains"),
)
AVERAGES = ("averages_cosine", "averages_constant", "averages_anneal", "averages_window", "averages_reptile")
VOCABULARY = ("vocabulary_old", "vocabulary_extended", "vocabulary_at_once")
TOKENIZER_ENTRIES, TOKENIZER_BYTES = 4096, 12_000_000
STEPS_BETWEEN_STORED = 20
HEAD = """# {title}: verdicts and losses

`python scripts/reproduce/reproduce.py` writes these tables from the results in this folder, after it has trained the
runs without a result (unless `--tables-only` is set). Losses are {unit} on validation novels, means over seeds
± standard error; AVG is the mean over the datasets. [{page}]({link}) describes the protocol and
discusses the results.

"""


@dataclass(frozen=True)
class RunSet:
    """Runs that one command trains, and the claims that they test.

    Attributes:
        file: of the tables, in the folder of the results.
        page: that discusses them, relative to it.
        needs_manuals: whether a run trains on the manuals.
        first: sweeps whose runs the others continue.
        unit: of the losses that are compared: "nats per token" or "bits per byte".
    """

    title: str
    sweeps: tuple[str, ...]
    claims: list[Claim]
    file: str
    page: str = "../reproduction.md"
    needs_manuals: bool = False
    first: tuple[str, ...] = ()
    unit: str = "nats per token"

    @property
    def all_sweeps(self) -> tuple[str, ...]:
        """Those that are trained first, then the others."""
        return (*self.first, *self.sweeps)


SETS = {
    "quick": RunSet("Short set", QUICK, claims("quick_"), "quick.md"),
    "full": RunSet("Full set", FULL, claims(), "full.md", needs_manuals=True),
    "averages": RunSet("Averages and Reptile", AVERAGES, averages_claims(), "averages_tables.md", "averages.md"),
    "vocabulary": RunSet(
        "An extended vocabulary",
        VOCABULARY,
        vocabulary_claims(),
        "vocabulary_tables.md",
        "vocabulary.md",
        first=("vocabulary_english",),
        unit="bits per byte",
    ),
}
_EVENTS = ("start", "adopt", "transition", "validation_changed")
_TITAN = (sys.executable, "-m", "titan_cpt")


def main() -> int:
    """Prepare data, train, write the tables; 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_const", dest="which", const="quick", help="three claims, one seed")
    which.add_argument(
        "--averages", action="store_const", dest="which", const="averages", help="averages of weights, and Reptile"
    )
    which.add_argument(
        "--vocabulary", action="store_const", dest="which", const="vocabulary", help="an extended vocabulary"
    )
    parser.add_argument("--archive", type=Path, help="novels from a file instead of the network: see fetch_novels.py")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time (default 2)")
    parser.add_argument("--runs", type=int, metavar="N", help="stop after N runs; the same command resumes")
    parser.add_argument("--arms", type=int, dest="runs", help=argparse.SUPPRESS)  # old name of --runs
    parser.add_argument("--launch", metavar="COMMAND", help="command that trains a run (default: titan-cpt train)")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "reproduction", metavar="FOLDER")
    parser.add_argument("--tables-only", action="store_true", help="do not train")
    options = parser.parse_args()
    chosen = SETS[options.which or "full"]
    failed = 0
    if not options.tables_only:
        if chosen is SETS["vocabulary"]:
            fetch(options.archive)
            make_vocabulary_data(DATA)
        else:
            make_data(options.archive, manuals=chosen.needs_manuals)
        for sweeps in filter(None, (chosen.first, chosen.sweeps)):
            failed += train(sweeps, options.results, jobs=options.jobs, at_most=options.runs, launch=options.launch)
    text = tables(chosen.claims, results_of(chosen, options.results), chosen.unit)
    options.results.mkdir(parents=True, exist_ok=True)
    out = options.results / chosen.file
    out.write_text(head_of(chosen) + text)
    print(text, f"written to {out}", sep="\n")
    return 1 if failed else 0


def head_of(chosen: RunSet) -> str:
    """The text above the tables."""
    return HEAD.format(title=chosen.title, unit=chosen.unit, page=Path(chosen.page).name, link=chosen.page)


def fetch(archive: Path | None) -> None:
    """Fetch the novels, unless they exist."""
    words = [sys.executable, str(HERE / "fetch_novels.py"), str(DATA)]
    subprocess.run([*words, *(["--archive", str(archive)] if archive else [])], check=True)


def make_data(archive: Path | None, *, manuals: bool) -> None:
    """Fetch the text, train the tokenizer and prepare the tokens, unless they exist."""
    fetch(archive)
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
    """The complete lines within a file's first `most_bytes`."""
    with path.open("rb") as file:
        return file.read(most_bytes).rpartition(b"\n")[0].decode() + "\n"


def train(sweeps: tuple[str, ...], results: Path, *, jobs: int, at_most: int | None, launch: str | None) -> int:
    """Train the runs without a result, `jobs` at a time, and store their metrics; returns how many failed."""
    files = [HERE / "configs" / f"{name}.toml" for name in sweeps]
    sweep_runs = read_sweep_runs(files)
    broken = [sweep_run for sweep_run in sweep_runs if not isinstance(sweep_run, SweepRun)]
    if broken:
        raise SystemExit(f"{broken[0].name}: {broken[0].problem}")
    waiting = in_turn(
        [(number, sweep_run) for number, sweep_run in enumerate(sweep_runs) if not has_result(sweep_run, results)]
    )
    print(f"{len(sweep_runs)} runs, {len(sweep_runs) - len(waiting)} finished", flush=True)

    def one(number: int, sweep_run: SweepRun) -> bool:
        words = [*_TITAN, "sweep", *map(str, files), "--index", str(number)]
        words += ["--launch", launch or shlex.join([*_TITAN, "train"])]
        process = subprocess.run(words, capture_output=True, text=True, check=False)
        if process.returncode == 0:
            store_result(sweep_run.folder, result_folder(sweep_run, results))
        outcome = "done"
        if process.returncode:
            outcome = f"failed ({process.returncode}): {process.stdout[-500:]}{process.stderr[-500:]}"
        print(f"[{number + 1}/{len(sweep_runs)}] {sweep_run.folder}: {outcome}", flush=True)
        return process.returncode == 0

    with ThreadPoolExecutor(jobs) as pool:
        return sum(not good for good in pool.map(lambda each: one(*each), waiting[:at_most]))


def in_turn(sweep_runs: list[tuple[int, SweepRun]]) -> list[tuple[int, SweepRun]]:
    """All runs of the first seed, then of the second, ...: a set stopped early has as many seeds for every claim."""
    return sorted(sweep_runs, key=lambda each: each[1].config.job.seed)


def result_folder(sweep_run: SweepRun, results: Path) -> Path:
    """The folder of a run's result: SWEEP/RUN."""
    return results / sweep_run.folder.parent.name / sweep_run.folder.name


def has_result(sweep_run: SweepRun, results: Path) -> bool:
    """Whether a result with the fingerprint of this plan exists."""
    path = result_folder(sweep_run, results) / "plan.json"
    return path.exists() and json.loads(path.read_text())["fingerprint"] == sweep_run.plan.fingerprint


def store_result(run_folder: Path, out: Path, *, every: int = STEPS_BETWEEN_STORED) -> None:
    """Copy a run's plan and thinned metrics: all validations, steps at an interval, the events that begin a stage."""
    record = read_run(run_folder)
    out.mkdir(parents=True, exist_ok=True)
    trains = [
        {key: value for key, value in line.items() if key != "batch_hash"}
        for line in record.trains
        if line["step"] % every == 0
    ]
    events = [event for event in record.events if event["name"] in _EVENTS]
    lines = [*events, *trains, *record.validations, *record.renewed]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / "plan.json").write_text(json.dumps(record.plan, indent=1))  # last: it marks the result as complete


def results_of(chosen: RunSet, folder: Path) -> Runs:
    """The final numbers of a set's runs, in its unit."""
    if chosen.unit == "bits per byte":
        return results_in_bits(folder, chosen.first[0], chosen.sweeps)
    return results(folder, chosen.all_sweeps)


def results_in_bits(folder: Path, before: str, sweeps: tuple[str, ...]) -> Runs:
    """The final bits per byte of runs that continue those of the sweep `before`, whose English is what is forgotten."""
    found: dict[tuple[str, int], End] = {}
    for path in result_files(folder, (before, *sweeps)):
        record = read_run(path.parent)
        stage = record.plan["stages"][-1]
        losses = {
            line["dataset"]: line["bits_per_byte"]
            for line in record.validations
            if (line["stage"], line["step"]) == (stage["name"], stage["steps"])
        }
        found[name_and_seed(path.parent)] = End(losses, math.nan, 0.0)
    for (name, seed), end in found.items():
        start = found.get((f"{before}/{before}", seed))
        if start is not None and not name.startswith(f"{before}/"):
            found[name, seed] = replace(end, forgetting=end.losses["english"] - start.losses["english"])
    return found


def result_files(folder: Path, sweeps: tuple[str, ...]) -> list[Path]:
    """The plan.json of every run with a result."""
    return sorted(path for name in sweeps for path in folder.glob(f"{name}/*/plan.json"))


def name_and_seed(folder: Path) -> tuple[str, int]:
    """(sweep/run without its seed and without the weights of this seed that it continues, seed)."""
    seed = re.search(r"_?seed-(\d+)(_init-.*)?$", folder.name)
    name = folder.name[: seed.start()] if seed else folder.name
    return f"{folder.parent.name}/{name or folder.parent.name}", int(seed[1]) if seed else 0


def results(folder: Path, sweeps: tuple[str, ...]) -> Runs:
    """The final numbers of every run with a result, by (sweep/run without its seed, seed)."""
    found: dict[tuple[str, int], End] = {}
    for path in result_files(folder, sweeps):
        record = read_run(path.parent)
        name, number = name_and_seed(path.parent)
        for end, suffix in zip(ends_of(record), ("", AVERAGE_SUFFIX), strict=False):
            found[f"{name}{suffix}", number] = end
        if name in ("replay/fraction-0", "quick_replay/fraction-0"):
            found["english/english", number] = end_of_first_stage(record)
    return found


def end_of(record: RunLog) -> End:
    """Final losses, forgetting, and the highest rise of the English loss within a later stage."""
    return ends_of(record)[0]


def ends_of(record: RunLog) -> list[End]:
    """`end_of` the run, and then of the average of its weights, if it has one; the rise is that of the weights."""
    rows = with_averages(compare([record]))
    rise = highest_rise(record)
    return [End(dict(row.losses), row.forgetting.get("english", math.nan), rise) for row in rows]


def end_of_first_stage(record: RunLog) -> End:
    """`end_of` at the end of the first stage."""
    plan = {**record.plan, "stages": record.plan["stages"][:1]}
    name = plan["stages"][0]["name"]
    lines = [line for line in record.validations if line["stage"] == name]
    return end_of(RunLog(record.name, record.folder, plan, [], lines, []))


def highest_rise(record: RunLog) -> float:
    """The largest rise of the English loss above its value at the stage's start, over all stages after the first."""
    rises = [0.0]
    for stage in record.plan["stages"][1:]:
        losses = {
            line["step"]: line["loss_nats_per_token"]
            for line in record.validations
            if line["stage"] == stage["name"] and line["dataset"] == "english"
        }
        rises.append(max(losses.values()) - losses[0])
    return max(rises)


def tables(tested: list[Claim], runs: Runs, unit: str = "nats per token") -> str:
    """Markdown: verdicts, the differences behind them, and mean and standard error over seeds of every run."""
    lines = ["| claim | | verdict |", "|---|---|---|"]
    behind = [
        f"| claim | difference | {unit} | standard error | allowed | seeds | |",
        "|---|---|---|---|---|---|---|",
    ]
    for claim in tested:
        findings = [judge(part, runs) for part in claim.parts]
        lines.append(f"| {claim.name} | {claim.statement} | **{verdict_on(findings)}** |")
        behind += [_row(claim, finding) for finding in findings]
    datasets = sorted({name for end in runs.values() for name in end.losses})
    rows = [f"| run | {' | '.join(datasets)} | AVG | forgetting | seeds |", "|---" * (len(datasets) + 4) + "|"]
    for name in sorted({name for name, _ in runs}):
        ends = [end for (of, _), end in runs.items() if of == name]
        cells = [_mean([end.losses[dataset] for end in ends if dataset in end.losses]) for dataset in datasets]
        cells += [_mean([end.average for end in ends]), _mean([end.forgetting for end in ends])]
        rows.append(f"| {name} | {' | '.join(cells)} | {len(ends)} |")
    return "\n".join([*lines, "", *behind, "", *(rows if runs else ["No run is finished."]), ""])


def _row(claim: Claim, finding: Finding) -> str:
    error = "" if finding.error is None else f"{finding.error:.4f}"
    rule = "> 0"
    if finding.part.rule != "above":
        sign = "<= " if finding.part.rule == "within" else "+-"
        rule = "" if math.isnan(finding.margin) else f"{sign}{finding.margin:.4f}"
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
