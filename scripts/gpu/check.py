"""Run the sections of check.sh on one GPU, or tiny on a CPU; prints a table and writes check.json (docs/gpu.md).

Each section has a time limit. A section that fails or exceeds it does not stop the others; one that no longer fits into
`--limit` is skipped, and the table says so. Sections that measure speed run one at a time, the others side by side.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from check_report import FAILED, INFO, OK, SKIPPED, Report, Row
from children import INDUCTOR_CACHE, ChildError, call, end_all

ROOT = Path(__file__).resolve().parents[2]
NEEDED = (  # cheap to import, so that a missing requirement of theirs is found here and not by every section
    *("numpy", "pydantic", "rich", "safetensors", "xxhash", "zstandard", "tomli_w", "orjson"),
    *("tokenizers", "gigatoken"),
)
FOUND = ("torch", "torchdata", "datasets", "tensorboard")  # slow to import
OPTIONAL = {"torchao": "float8", "pytest": "tests", "litgpt": "races", "torchtitan": "races", "transformers": "races"}
_SECONDS_FOR_THE_REPORT = 5


@dataclass
class Context:
    """What a section gets: device, folder, deadline, and the report to which it adds rows.

    Attributes:
        tiny: smallest shapes, for a dry run on a CPU.
        text: folder with the quick start's text or prepared tokens; None if none was given.
        baseline: checkout of another commit, with which race Q compares; None if none was given.
        races: the races to run.
        deadline: time.monotonic at which the section must have ended.
    """

    section: str
    device: str
    tiny: bool
    folder: Path
    text: Path | None
    baseline: Path | None
    deadline: float
    report: Report
    gpus: int = 0
    races: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def row(self, check: str, *, value: str, expected: str = "", ok: bool | None = None) -> None:
        """Add a row; `ok` is None for a figure that has no expected value."""
        status = INFO if ok is None else OK if ok else FAILED
        self.report.add(Row(self.section, check, status, value, expected))

    def skip(self, check: str, why: str) -> None:
        """Add a row for a check that was not made."""
        self.report.add(Row(self.section, check, SKIPPED, why))

    def call(self, function: Callable[..., Any], *arguments: Any, log: str, environment: Any = None) -> Any:
        """Run a function in a child until the deadline; returns its result. Raises ChildError if it fails."""
        log_file = self.folder / f"{log}.log"
        return call(function, *arguments, log=log_file, deadline=self.deadline, environment=environment)


@dataclass(frozen=True)
class Section:
    """A group of checks.

    Attributes:
        limit_s: its time limit.
        least_s: it is skipped when fewer seconds are left.
        alone: nothing else runs at the same time, because it measures speed.
    """

    name: str
    about: str
    run: Callable[[Context], None]
    limit_s: float
    least_s: float
    alone: bool = False


def sections() -> list[Section]:
    """All sections in the order in which they run."""
    import correctness
    import documents
    import options
    import speed
    import suites

    return [
        Section("ceilings", "FLOP/s of a product and bytes/s of a copy", speed.ceilings, 45, 10, alone=True),
        # Side by side, all at once, so that the group takes no longer than its longest limit.
        Section("quickstart", "the quick start against this CPU's losses", correctness.quickstart, 150, 60),
        Section("losses", "the same losses in float32, bfloat16, float8", correctness.losses, 150, 30),
        Section("compile", "the same losses compiled", correctness.compiled, 150, 30),
        Section("resume", "bit-exact resume after kill -9; async saves", correctness.resume, 120, 30),
        Section("memory", "peak memory against the plan's", correctness.memory, 150, 40),
        Section("offload", "CPU offload", correctness.offload, 90, 20),
        Section("tests", "the tests that need a GPU", suites.gpu_tests, 150, 30),
        # One at a time; the goals first. The profile finds what the races have compiled in inductor's cache.
        Section("races", "tokens/s beside other trainers; the goals", speed.races, 280, 60, alone=True),
        Section("profile", "where a step's time goes", speed.profile, 100, 30, alone=True),
        Section("documents", "attention inside documents, and across them", documents.run, 200, 60, alone=True),
        Section("speed", "tokens/s with and without each option", speed.options, 180, 40, alone=True),
        Section("options", "new options: losses and bit-exact resume", options.parity, 240, 40),
        Section("suite", "the whole test suite on this machine", suites.whole, 400, 120, alone=True),
    ]


def run_section(section: Section, make: Callable[[str, float], Context], deadline: float, *, only: bool) -> None:
    """Run a section; its failure becomes a row. The `only` one may take all the time."""
    began = time.monotonic()
    context = make(section.name, min(began + (math.inf if only else section.limit_s), deadline))
    if context.left_s < section.least_s:
        context.skip("whole section", f"{context.left_s:.0f} s left, needs {section.least_s:.0f}")
        return
    try:
        section.run(context)
    except ChildError as error:
        context.row("section", value=str(error), ok=False)
    except Exception as error:  # any failure of one section is a row of the table, and the others run
        context.row("section", value=f"{type(error).__name__}: {error}", ok=False)
    report = context.report
    report.sections[section.name] = {"seconds": time.monotonic() - began}
    report.figures[section.name] = context.figures
    report.write()


def chosen(names: list[str], options: argparse.Namespace) -> list[str]:
    """The sections that --only and --skip leave."""
    only, skip = (set(filter(None, text.split(","))) for text in (options.only, options.skip))
    if unknown := sorted((only | skip) - set(names)):
        print(f"check.sh: no section {', '.join(unknown)}; there are {', '.join(names)}", file=sys.stderr)
        raise SystemExit(2)
    return [name for name in names if name not in skip and (not only or name in only)]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="check.sh", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder for check.json, check.md, logs.txt")
    parser.add_argument("--limit", type=float, default=540, help="seconds for everything (default 540)")
    parser.add_argument("--only", default="", help="sections to run, comma-separated")
    parser.add_argument("--skip", default="", help="sections not to run, comma-separated")
    parser.add_argument("--text", type=Path, help="folder with english.jsonl and german.jsonl of the quick start")
    parser.add_argument("--baseline", type=Path, help="checkout of another commit of titan_cpt, for race Q")
    parser.add_argument(
        "--races", default="G405,L1B,Q,W4096", help="races, comma-separated, in this order (default all)"
    )
    parser.add_argument("--jobs", type=int, default=8, help="sections side by side, of those that time nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--list", action="store_true", help="print the sections and end")
    return parser.parse_args(arguments)


def check_packages() -> None:
    """Exit with status 2 if a package is missing without which nothing runs; name the others."""
    missing = [name for name in FOUND if importlib.util.find_spec(name) is None]
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:  # the package, or one that it requires
            missing.append(str(error.name))
    if missing:
        print(
            f"check.sh: {sys.executable} has no {', '.join(dict.fromkeys(missing))}: install titan_cpt's requirements, "
            "or give wheels with --wheels (scripts/gpu/wheels.sh downloads them)",
            file=sys.stderr,
        )
        raise SystemExit(2)
    for name, section in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            print(f"check.sh: no {name}: what needs it in section {section} is skipped", flush=True)


def main(arguments: Sequence[str]) -> int:
    """Run the chosen sections; returns the exit status."""
    options = parse(arguments)
    check_packages()
    every = sections()
    if options.list:
        for section in every:
            print(f"{section.name:12} {section.about}")
        return 0
    wanted = chosen([section.name for section in every], options)
    races = chosen_races(options)
    deadline = time.monotonic() + options.limit - _SECONDS_FOR_THE_REPORT
    device = "cpu" if options.dry_run else options.device
    report = Report(options.out, [section.name for section in every])
    try:
        report.keep_earlier()
    except OSError as error:
        print(f"check.sh: --out {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as work:
        folder = Path(work)
        report.about = about(folder, options, device)
        if device == "cuda" and not report.about["cuda_available"]:
            print(f"check.sh: torch {report.about['torch']} sees no GPU; --dry-run runs on the CPU", file=sys.stderr)
            return 2

        def make(name: str, until: float) -> Context:
            place = folder / name
            place.mkdir(exist_ok=True)
            text, baseline = (path and path.resolve() for path in (options.text, options.baseline))
            gpus = report.about["gpus"]
            return Context(name, device, options.dry_run, place, text, baseline, until, report, gpus=gpus, races=races)

        run = partial(run_section, make=make, deadline=deadline, only=len(wanted) == 1)
        selected = [section for section in every if section.name in wanted]
        stopped = run_all(selected, run, jobs=options.jobs, cache=folder / "inductor")
        report.write()
        report.write_logs(folder)
    print(f"\n{report.table()}", flush=True)
    return 130 if stopped else 1 if report.failed else 0


def run_all(wanted: list[Section], run: Callable[[Section], None], *, jobs: int, cache: Path) -> bool:
    """Run the sections; whether Ctrl-C or SIGTERM ended them. Their processes are then killed.

    Inductor chooses kernels by timing them and stores the choice: what is compiled beside others has its own `cache`.
    """
    original = os.environ.get(INDUCTOR_CACHE)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    for alone, group in groupby(wanted, key=lambda section: section.alone):
        if not alone:
            os.environ[INDUCTOR_CACHE] = str(cache)
        elif original is None:
            os.environ.pop(INDUCTOR_CACHE, None)
        else:
            os.environ[INDUCTOR_CACHE] = original
        pool = ThreadPoolExecutor(1 if alone else max(1, jobs))
        try:
            for done in [pool.submit(run, section) for section in group]:
                done.result()
        except KeyboardInterrupt:
            print("check.sh: stopped; what was measured until now is in the table", file=sys.stderr, flush=True)
            pool.shutdown(wait=False, cancel_futures=True)
            end_all()
            pool.shutdown()
            return True
        pool.shutdown()
    return False


def chosen_races(options: argparse.Namespace) -> tuple[str, ...]:
    """The races of --races."""
    import speed

    races = tuple(filter(None, options.races.split(",")))
    if unknown := sorted(set(races) - speed.RACES.keys()):
        print(f"check.sh: no race {', '.join(unknown)}; there are {', '.join(speed.RACES)}", file=sys.stderr)
        raise SystemExit(2)
    return races


def about(folder: Path, options: argparse.Namespace, device: str) -> dict[str, Any]:
    """The machine, the versions, the commit and the options."""
    import measure

    found: dict[str, Any] = call(measure.describe, log=folder / "describe.log", deadline=time.monotonic() + 90)
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]
    commit = "unknown"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
        commit += " with changes" if changed else ""
    text = "none: generated tokens, no quick start" if options.text is None else str(options.text)
    return {
        **found,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "checked_on": device,
        "dry_run": options.dry_run,
        "arguments": sys.argv[1:],
        "text": text,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
