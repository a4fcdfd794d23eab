"""Run the sections of check.sh on one GPU, or tiny on a CPU; prints a table and writes check.json (docs/gpu.md).

Each section has a time limit. A section that fails or exceeds it does not stop the others; one that no longer fits into
`--limit` is skipped, and the table says so. Sections that measure speed run one at a time, the others side by side.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from children import ChildError, call
from report import FAILED, INFO, OK, SKIPPED, Report, Row

ROOT = Path(__file__).resolve().parents[2]
NEEDED = (
    "torch",
    "numpy",
    "pydantic",
    "rich",
    "tiktoken",
    "torchdata",
    "safetensors",
    "xxhash",
    "zstandard",
    "tomli_w",
)
OPTIONAL = {"torchao": "float8", "pytest": "tests", "litgpt": "races", "torchtitan": "races", "transformers": "races"}
_SECONDS_FOR_THE_REPORT = 5


@dataclass
class Context:
    """What a section gets: device, folder, deadline, and the report to which it adds rows.

    Attributes:
        tiny: smallest shapes, for a dry run on a CPU.
        text: folder with the quick start's text or prepared tokens; None if none was given.
        baseline: checkout of another commit, with which the races compare; None if none was given.
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
    import options
    import speed
    import suites

    return [
        Section("ceilings", "FLOP/s of a product and bytes/s of a copy", speed.ceilings, 45, 10, alone=True),
        # Side by side; the longest first.
        Section("tests", "the tests that need a GPU", suites.gpu_tests, 200, 30),
        Section("options", "new options: losses and bit-exact resume", options.parity, 180, 40),
        Section("quickstart", "the quick start against this CPU's losses", correctness.quickstart, 200, 60),
        Section("memory", "peak memory against the plan's", correctness.memory, 150, 40),
        Section("losses", "the same losses in float32, bfloat16, float8", correctness.losses, 150, 30),
        Section("compile", "the same losses compiled", correctness.compiled, 150, 30),
        Section("resume", "bit-exact resume after kill -9; async saves", correctness.resume, 120, 30),
        Section("offload", "CPU offload", correctness.offload, 90, 20),
        Section("profile", "where a step's time goes; float8", speed.profile, 130, 40, alone=True),
        Section("races", "tokens/s beside other trainers", speed.races, 240, 60, alone=True),
        Section("speed", "tokens/s with and without each option", speed.options, 180, 40, alone=True),
        Section("suite", "the whole test suite on this machine", suites.whole, 400, 120, alone=True),
    ]


def run_section(section: Section, make: Callable[[str, float], Context], deadline: float) -> None:
    """Run a section; its failure becomes a row."""
    began = time.monotonic()
    context = make(section.name, min(began + section.limit_s, deadline))
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
    parser.add_argument("--baseline", type=Path, help="checkout of another commit of titan_cpt, for the races")
    parser.add_argument("--jobs", type=int, default=5, help="sections side by side, of those that time nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--list", action="store_true", help="print the sections and end")
    return parser.parse_args(arguments)


def check_packages() -> None:
    """Exit with status 2 if a package is missing without which nothing runs; name the others."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"check.sh: {sys.executable} has no {', '.join(missing)}: install titan_cpt's requirements, or give wheels "
            "with --wheels (scripts/gpu/wheels.sh downloads them)",
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
    names = [section.name for section in every]
    if options.list:
        for section in every:
            print(f"{section.name:12} {section.about}")
        return 0
    wanted = chosen(names, options)
    deadline = time.monotonic() + options.limit - _SECONDS_FOR_THE_REPORT
    device = "cpu" if options.dry_run else options.device
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.out)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
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
            return Context(name, device, options.dry_run, place, text, baseline, until, report, gpus=gpus)

        for alone, group in groupby((s for s in every if s.name in wanted), key=lambda section: section.alone):
            with ThreadPoolExecutor(1 if alone else max(1, options.jobs)) as pool:
                for _ in pool.map(lambda section: run_section(section, make, deadline), group):
                    report.write(names)
        report.write(names)
        write_logs(folder, options.out / "logs.txt")
    print(f"\n{report.table()}", flush=True)
    return 1 if report.failed else 0


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


def write_logs(folder: Path, path: Path, limit_bytes: int = 20_000) -> None:
    """Collect the end of every log in one file."""
    with path.open("w") as out:
        for log in sorted(folder.rglob("*.log")):
            out.write(f"==== {log.relative_to(folder)}\n{log.read_text(errors='replace')[-limit_bytes:]}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
