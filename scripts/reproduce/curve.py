"""The gap to joint training over tokens: text, sweep runs, tables, law and verdicts. See docs/reproduction/curve.md.

    python scripts/reproduce/curve.py --archive novels.tar.xz          # CPU set: two cores, about 2 1/2 hours
    python scripts/reproduce/curve.py --set gpu --archive ... --limit 690     # GPU set: 12 runs at a time on one GPU
    python scripts/reproduce/curve.py --plan                           # the runs and their tokens; trains nothing
    python scripts/reproduce/curve.py --tables-only                    # from the results in docs/reproduction/curve

Every finished run leaves its thinned metrics in docs/reproduction/curve/SET/SWEEP/RUN. Runs found there are not trained
again, on any machine: commit the folder and continue elsewhere. SET/data.json has the checksums of the tokens, so that
all runs of a set have the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from curve_rules import LENGTHS, NONE, QUARTER
from curve_tables import SWEEPS, as_record, curve_text, draw, read_results
from reproduce import first_lines, has_result, result_folder, store_result

from titan_cpt.runs.sweep_runs import SweepRun, read_sweep_runs

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DATA = Path("data/curve")  # in the working directory, as in the configs
TOKENIZER_ENTRIES, TOKENIZER_BYTES = 1024, 12_000_000
STEPS_BETWEEN_STORED = 320
FETCHED = ("guides_en", "manpages_en", "guides_de", "manpages_de", "python", "django", "postgresql", "git")
NOVELS = ("novels_early", "novels_late", "novels_de")
TEXTS = (*FETCHED, *NOVELS)
LATE_FROM = 1880  # English novels of this year and later are new data of the weak shift
LONGEST = max(LENGTHS)
_TITAN = (sys.executable, "-m", "titan_cpt")
GPU_MODEL = (
    ("model.width", "128"),
    ("training.global_batch_size", "51"),
    ("training.local_batch_size", "51"),
    ("training.cuda_graphs", "true"),  # steps of a model of this size are mostly launches
    ("job.output_dir", "outputs/curve/gpu"),
)
TINY = (  # a dry run: the same runs and code in minutes
    ("model.width", "16"),
    ("model.heads", "1"),
    ("model.layers", "1"),
    ("training.global_batch_size", "2"),
    ("training.local_batch_size", "2"),
    ("training.seq_len", "16"),
    ("validation.sequences", "4"),
    ("validation.interval", "4"),
    ("validation.final_window_steps", "0"),
    ("job.output_dir", "outputs/curve/tiny"),
)
TINY_STEPS = {steps: 4 + 2 * number for number, steps in enumerate(LENGTHS)}
HEAD = """# The curve over tokens, {name} set: gaps, forgetting, law, verdicts, losses

`python scripts/reproduce/curve.py --set {name}` writes these tables from the results in this folder; {finished} runs
are finished. Losses are nats per token, means over seeds ± standard error, with the number of seeds in parentheses. The
gap is the mean final loss on old and new data minus that of joint training on the tokens of both stages.
[curve.md](../../curve.md) describes the protocol.

{text}"""


@dataclass(frozen=True)
class Set:
    """Runs that one command trains.

    Attributes:
        overrides: of the config files.
        longest_arms: what is trained, with seed 0, at the longest length; None: all.
        longest_first: whether the longest runs begin first, which would otherwise end last.
        jobs: runs at a time.
    """

    overrides: tuple[tuple[str, str], ...] = ()
    longest_arms: tuple[str, ...] | None = None
    longest_first: bool = False
    jobs: int = 2


SETS = {
    "cpu": Set(longest_arms=("strong_union", f"strong_{NONE}", f"strong_{QUARTER}")),
    "gpu": Set(GPU_MODEL, longest_first=True, jobs=12),
    "tiny": Set(TINY),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare data, train, write the tables; 1 if a run failed."""
    options = _parser().parse_args(arguments)
    chosen = SETS[options.set]
    results = options.results / options.set
    failed = 0
    if options.plan:
        print(plan_text(waiting_runs(options.set, results)))
        return 0
    if not options.tables_only:
        make_data(options.archive)
        require_same_data(results)
        jobs = options.jobs or chosen.jobs
        failed = train(options.set, results, jobs=jobs, limit_s=options.limit, launch=options.launch)
    write_tables(options.set, results)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--set", choices=SETS, default="cpu", help="default: %(default)s; tiny is a dry run")
    parser.add_argument("--archive", type=Path, help="novels from a file instead of the network: see fetch_novels.py")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: 2 on a CPU, 12 on a GPU)")
    parser.add_argument("--limit", type=float, metavar="S", help="begin no run after this many seconds")
    parser.add_argument("--launch", metavar="COMMAND", help="command that trains a run (default: titan-cpt train)")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "reproduction" / "curve", metavar="FOLDER")
    parser.add_argument("--plan", action="store_true", help="print the runs without a result, and train nothing")
    parser.add_argument("--tables-only", action="store_true", help="do not train")
    return parser


def write_tables(name: str, results: Path) -> None:
    """Write tables.md, gaps.json and curve.png from the results of a set."""
    runs, tokens = read_results(results)
    finished = len(list(results.glob("*/*/plan.json")))
    results.mkdir(parents=True, exist_ok=True)
    text = HEAD.format(name=name, finished=finished, text=curve_text(runs, tokens))
    (results / "tables.md").write_text(text)
    (results / "gaps.json").write_text(as_record(runs, tokens))
    if runs:
        draw(runs, tokens, results / "curve.png")
    print(f"{finished} runs; tables written to {results / 'tables.md'}")


def make_data(archive: Path | None) -> None:
    """Fetch the text, train the tokenizer and prepare the tokens, unless they exist."""
    DATA.mkdir(parents=True, exist_ok=True)
    if not all((DATA / f"{name}{part}.jsonl").exists() for name in NOVELS for part in ("", "-heldout")):
        take_novels(Path("data/reproduce"), archive)
    fetch = [sys.executable, str(HERE / "fetch_curve_text.py"), str(DATA), "--sources", ",".join(FETCHED)]
    subprocess.run(fetch, check=True)
    texts = {name: DATA / f"{name}.jsonl" for name in TEXTS}
    tokenizer = DATA / "tokenizer.json"
    if not tokenizer.exists():
        sample = DATA / "tokenizer_sample.jsonl"
        english = ("guides_en", "manpages_en", "novels_early")
        sample.write_text("".join(first_lines(texts[name], TOKENIZER_BYTES // len(english)) for name in english))
        words = ["prepare", "--input", str(sample), "--train-tokenizer", str(TOKENIZER_ENTRIES), "--output"]
        subprocess.run([*_TITAN, *words, str(tokenizer)], check=True)
    for name, text in texts.items():
        for part in ("", "-heldout"):
            prefix = DATA / f"{name}{part}"
            if text.exists() and not prefix.with_suffix(".idx").exists():
                words = ["--input", str(text.with_stem(text.stem + part)), "--output", str(prefix)]
                subprocess.run([*_TITAN, "prepare", *words, "--tokenizer", str(tokenizer)], check=True)


def require_same_data(results: Path) -> None:
    """Record the checksums of tokenizer and tokens with the first results of a set; later, compare them."""
    files = [DATA / "tokenizer.json", *(DATA / f"{name}{part}.bin" for name in TEXTS for part in ("", "-heldout"))]
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.exists()}
    record = results / "data.json"
    known = json.loads(record.read_text()) if record.exists() else found
    if changed := sorted(name for name in {*known, *found} if known.get(name) != found.get(name)):
        raise SystemExit(
            f"{DATA}: {', '.join(changed)}: not the data of the results in {results} (data.json there). "
            "Copy that machine's folder, or put the results of this data into another folder with --results"
        )
    results.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(found, indent=1) + "\n")


def take_novels(folder: Path, archive: Path | None) -> None:
    """Fetch the novels into a folder; English ones are split by year, German ones copied."""
    fetch = [sys.executable, str(HERE / "fetch_novels.py"), str(folder)]
    subprocess.run([*fetch, *(["--archive", str(archive)] if archive else [])], check=True)
    for part in ("", "-heldout"):
        split_by_year(folder / f"english{part}.jsonl", part)
        shutil.copy(folder / f"german{part}.jsonl", DATA / f"novels_de{part}.jsonl")


def split_by_year(path: Path, part: str) -> None:
    """Write the English novels until 1879 and those from 1880 on, by the year in their names (ENG18400_Trollope)."""
    lines: dict[str, list[str]] = {"early": [], "late": []}
    with path.open() as file:  # not splitlines(), which also splits at U+2028 in a text
        for line in file:
            year = re.match(r"ENG(1[89]\d\d)", json.loads(line)["id"])
            if year is None:
                raise SystemExit(f"{path}: a novel whose name has no year: {json.loads(line)['id']}")
            lines["early" if int(year[1]) < LATE_FROM else "late"].append(line)
    for half, own in lines.items():
        (DATA / f"novels_{half}{part}.jsonl").write_text("".join(own))


def sweep_files() -> list[Path]:
    """The config files of all sweeps."""
    return [HERE / "configs" / "curve" / f"{name}.toml" for name in SWEEPS]


def overrides_of(name: str, file: Path) -> list[tuple[str, str]]:
    """What a set changes of a config file; the dry run also its steps."""
    changed = list(SETS[name].overrides)
    if name == "tiny":
        one, both = list(TINY_STEPS.values()), [2 * steps for steps in TINY_STEPS.values()]
        union = file.stem.endswith("_union")
        keys = (
            ("sweep.stages.english.steps",)
            if union
            else ("sweep.zip.stages.english.steps", "sweep.zip.stages.new.steps")
        )
        changed += [(key, str(both if union else one)) for key in keys]
    return changed


@dataclass(frozen=True)
class Planned:
    """A run of a set: its file, its number in it, and its plan."""

    file: Path
    index: int
    run: SweepRun

    @property
    def seed(self) -> int:
        """The seed of its data and weights."""
        return self.run.config.job.seed

    @property
    def steps(self) -> int:
        """Nominal steps of one stage, a key of LENGTHS."""
        steps = sum(stage.steps for stage in self.run.plan.stages) // 2
        return next((nominal for nominal, tiny in TINY_STEPS.items() if tiny == steps), steps)

    @property
    def arm(self) -> str:
        """SWEEP, or SWEEP/fraction-F of the replay sweeps."""
        share = re.search(r"fraction-[\d.]+", self.run.name)
        return f"{self.file.stem}/{share[0]}" if share else self.file.stem


def planned_runs(name: str) -> list[Planned]:
    """All runs of a set in the order of training.

    Seed by seed, so that a set stopped early has as many seeds for every claim. Runs that train a shared English stage
    begin first, then those with stages of their own, so that no run waits for a stage that another one trains.
    """
    chosen = SETS[name]
    found = []
    for file in sweep_files():
        for index, run in enumerate(read_sweep_runs([file], overrides_of(name, file))):
            if not isinstance(run, SweepRun):
                raise SystemExit(f"{run.name}: {run.problem}")
            found.append(Planned(file, index, run))
    return sorted((each for each in found if _is_in(each, chosen)), key=lambda each: _turn(each, chosen))


def _is_in(each: Planned, chosen: Set) -> bool:
    if each.steps < LONGEST:
        return True
    return each.seed == 0 and (chosen.longest_arms is None or each.arm in chosen.longest_arms)


def _turn(each: Planned, chosen: Set) -> tuple[int, int, int]:
    is_longest = each.steps == LONGEST
    tier = (-1 if chosen.longest_first else 9) if is_longest else each.seed
    first = {f"strong_{NONE}": 0, "strong_union": 1, "weak_union": 1, "strong_infinite": 1}
    return tier, first.get(each.arm, 2), each.steps


def waiting_runs(name: str, results: Path) -> list[Planned]:
    """The runs of a set that have no result."""
    return [each for each in planned_runs(name) if not has_result(each.run, results)]


def plan_text(waiting: Sequence[Planned]) -> str:
    """A line for each length: runs, steps and tokens to train, shared stages counted once."""
    rows = []
    for steps in LENGTHS:
        own = [each for each in waiting if each.steps == steps]
        trained = sum(steps_to_train(own).values())
        tokens = sum(
            count * each.run.plan.step_tokens for each, count in zip(own, steps_to_train(own).values(), strict=True)
        )
        rows.append(
            f"{LENGTHS[steps]:>3} tokens a parameter: {len(own)} runs, {trained:,} steps, {tokens / 1e6:,.1f}M tokens"
        )
    return "\n".join([*rows, f"{len(waiting)} runs"])


def steps_to_train(planned: Sequence[Planned]) -> dict[Path, int]:
    """Steps of every run by folder, without stages that an earlier run of the list trains."""
    seen: set[str] = set()
    counts = {}
    for each in planned:
        count = 0
        for number, stage in enumerate(each.run.plan.stages):
            recipe = json.dumps(each.run.plan.recipe_until(number), default=str)
            count += 0 if recipe in seen else stage.steps
            seen.add(recipe)
        counts[each.run.folder] = count
    return counts


def train(name: str, results: Path, *, jobs: int, limit_s: float | None, launch: str | None) -> int:
    """Train the runs without a result, `jobs` at a time, and store their metrics; returns how many failed."""
    started = time.monotonic()
    waiting = waiting_runs(name, results)
    print(plan_text(waiting), flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def one(each: Planned) -> bool:
        if limit_s is not None and time.monotonic() - started > limit_s:
            return True
        words = [*_TITAN, "sweep", str(each.file), "--index", str(each.index)]
        words += ["--launch", launch or shlex.join([*_TITAN, "train"])]
        words += [word for key, value in overrides_of(name, each.file) for word in (f"--{key}", value)]
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
        if done.returncode == 0:
            keep(each, results)
        outcome = (
            "done" if done.returncode == 0 else f"failed ({done.returncode}): {done.stdout[-500:]}{done.stderr[-500:]}"
        )
        print(f"{time.monotonic() - started:.0f} s: {each.run.folder}: {outcome}", flush=True)
        return done.returncode == 0

    with ThreadPoolExecutor(jobs) as pool:
        failed = sum(not good for good in pool.map(one, waiting))
    left = sum(not has_result(each.run, results) for each in waiting)
    print(f"{len(waiting) - left} runs trained, {left} without a result; the same command resumes", flush=True)
    return failed


def keep(each: Planned, results: Path) -> None:
    """Store a run's thinned metrics and its plan, with the nominal steps."""
    out = result_folder(each.run, results)
    store_result(each.run.folder, out, every=STEPS_BETWEEN_STORED)
    plan = json.loads((out / "plan.json").read_text())
    (out / "plan.json").write_text(json.dumps({**plan, "nominal_steps": each.steps}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
