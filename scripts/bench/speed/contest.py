"""Run the trainers of one shape: start their processes, let them take turns, collect their figures.

On a GPU all trainers share the device's memory. One computes at a time, and an idle one keeps its weights, moments and
CUDA graphs only. If the next trainer would not fit beside them, those present take all their turns first and leave
(a heat); the reference, titan_cpt's first variant, stays and takes turns in every heat, so that ratios are always
those of trainers that ran in turns with it.
"""

from __future__ import annotations

import json
import math
import os
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shapes import Race

HERE = Path(__file__).parent
LEARNING_RATE = 3e-4
LOSS_TOLERANCE = {"bfloat16": 0.02, "float32": 2e-4}
FLOAT8_TOLERANCE = 0.05
PRODUCTS_A_TURN = 10
LEAST_TURNS = 2
MORE_TRIES = 2  # of a trainer that finds too little memory beside others
STARTING_SHARE = 0.75  # of --budget: after this much of it no further trainer starts
LEAST_PATIENCE_S = 60.0  # a compilation takes up to half a minute
NEEDED = 1.5  # memory that the next trainer may need, relative to the reference's peak: litgpt's is 1.47 on G405


@dataclass(frozen=True)
class Entry:
    """A contestant: its name in the tables, its kind (ours or one of peers.py), and how it is started.

    Attributes:
        overrides: config keys of titan_cpt.
        source: checkout of titan_cpt that runs instead of the installed one.
    """

    name: str
    kind: str
    variant: str = ""
    compiled: bool = False
    allocator: bool = False
    overrides: dict[str, str] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class Settings:
    """What the command line chose for all races.

    Attributes:
        device: "cpu" or "cuda": where the trainers run; `target` is the device whose table is printed (in a dry run of
            the GPU's races they differ).
        peers: Python that runs the other trainers, and `wheels`, a folder of unpacked packages for it, or empty.
        budget_s: seconds for one race; infinite if not given.
        patience_s: seconds after which a silent trainer is ended.
        parallel: trainers that load and compile at the same time on CUDA.
    """

    device: str
    target: str
    peers: str
    wheels: str
    turns: int
    dry_run: bool
    budget_s: float
    patience_s: float
    parallel: int = 1
    folder: Path | None = None


@dataclass
class Contestant:
    """The process of one trainer, and its results."""

    entry: Entry
    process: subprocess.Popen[str]
    log: Path
    status: str = "waits"
    reason: str = ""
    heat: int = 0
    tries: int = 0
    first_loss: float = 0.0
    speeds: list[float] = field(default_factory=list)
    cpu_speeds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peaks_gib: list[tuple[float, float]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def ask(self, request: str, patience_s: float) -> dict[str, Any] | None:
        """Send a line and return the answer, as `answer` does."""
        self.tell(request)
        return self.answer(patience_s)

    def tell(self, request: str) -> None:
        """Send a line."""
        assert self.process.stdin is not None, "it was started with pipes"
        with suppress(BrokenPipeError):  # a process that has ended may have said why
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()

    def answer(self, patience_s: float) -> dict[str, Any] | None:
        """Wait for the answer; None, with status and reason set, if there is no usable one."""
        assert self.process.stdout is not None, "it was started with pipes"
        if not select.select([self.process.stdout], [], [], patience_s)[0]:
            self._fail(f"no answer within {patience_s:.0f} s")
            return None
        line = self.process.stdout.readline()
        if not line:
            lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            self._fail(f"exited: {lines[-1][:300] if lines else 'without a message'}")
            return None
        answer: dict[str, Any] = json.loads(line)
        if "status" in answer:
            self._fail(answer["reason"], answer["status"])
            return None
        self.figures |= {key: value for key, value in answer.items() if key not in ("losses", "seconds", "cpu_s")}
        return answer

    def _fail(self, reason: str, status: str = "failed") -> None:
        self.status, self.reason = status, reason
        self.leave()

    def turn(self, steps: int, work: float, patience_s: float) -> None:
        """Let it take `steps` steps of `work` tokens (or operations) each; record their speed and losses."""
        if self.status != "ran" or (answer := self.ask(str(steps), patience_s)) is None:
            return
        self.speeds.append(steps * work / answer["seconds"])
        self.cpu_speeds.append(steps * work / max(answer["cpu_s"], 1e-9))
        self.losses += answer["losses"]
        self.peaks_gib.append((answer["peak_gib"], answer.get("peak_reserved_gib", 0.0)))

    def leave(self) -> None:
        """End the process and wait for it, so that its memory is free."""
        end(self.process)


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process, wait for it and close its pipes; does nothing if this was done before."""
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):  # what was written and never read
            if pipe is not None:
                pipe.close()
    process.wait()


def race(spec: Race, entries: list[Entry], settings: Settings) -> dict[str, Any]:
    """Run all trainers of one shape, in turns; returns the figures, as in the JSON file."""
    with _temporary_folder(settings) as folder:
        contest = _Contest(spec, settings, folder)
        try:
            return contest.run(entries)
        finally:
            for process in contest.processes:
                end(process)


@contextmanager
def _temporary_folder(settings: Settings) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="race-", dir=settings.folder))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Contest:
    """One race under way.

    Attributes:
        reference: the first trainer that could be loaded; takes turns in every heat.
        waiting: trainers that are not loaded yet.
        heats: speeds of the reference in the turns of every heat.
    """

    def __init__(self, spec: Race, settings: Settings, folder: Path) -> None:
        self.spec, self.settings, self.folder = spec, settings, folder
        self.begin = time.perf_counter()
        self.processes: list[subprocess.Popen[str]] = []
        self.reference: Contestant | None = None
        self.waiting: deque[Contestant] = deque()
        self.heats: list[list[float]] = []
        size = 8192 if settings.device == "cuda" else 2048
        self.product = size if not settings.dry_run else 256
        # The first step; then in every turn the timed ones, and on CUDA one that is not timed.
        self.steps = 2 + settings.turns * (spec.steps_a_turn + (settings.device == "cuda"))

    @property
    def left_s(self) -> float:
        """Seconds that are left of the budget."""
        return self.settings.budget_s - (time.perf_counter() - self.begin)

    @property
    def patience_s(self) -> float:
        """How long to wait for an answer: a silent trainer may not take the budget of all others."""
        return min(self.settings.patience_s, max(self.left_s, LEAST_PATIENCE_S))

    def run(self, entries: list[Entry]) -> dict[str, Any]:
        """Start, take turns, report."""
        scribe = self.start(Entry("prepare", "ours"), "prepare")
        contestants = [self.start(entry, f"{number}-{entry.kind}") for number, entry in enumerate(entries)]
        facts = scribe.ask("load", self.settings.patience_s)
        if facts is None or scribe.ask("load", self.settings.patience_s) is None:
            tail = scribe.log.read_text(errors="replace")[-3000:]
            sys.exit(f"{self.spec.key}: the inputs could not be prepared: {scribe.reason}\n{tail}")
        scribe.status = "ran"
        self.waiting.extend(contestants)
        while self.waiting:
            present = [self.reference] if self.reference and self.reference.status == "ran" else []
            self._fill(present)
            self._take_turns(present, scribe)
            for contestant in present:
                if contestant is not self.reference:
                    contestant.leave()
        if not scribe.speeds:
            sys.exit(f"{self.spec.key}: no matrix product could be timed: {scribe.reason}")
        return self._result(contestants, facts, statistics.median(scribe.speeds))

    def start(self, entry: Entry, name: str) -> Contestant:
        """Start a trainer's process, which imports its libraries and waits."""
        settings, spec = self.settings, self.spec
        options = {
            "name": name,
            "kind": entry.kind,
            "compiled": entry.compiled,
            "allocator": entry.allocator,
            "overrides": entry.overrides,
            "source": entry.source,
            "folder": str(self.folder),
            "family": spec.family,
            "shape": spec.shape,
            "precision": spec.precision,
            "batch": spec.batch,
            "seq_len": spec.seq_len,
            "steps": self.steps,
            "lr": LEARNING_RATE,
            "device": settings.device,
            "product": self.product,
        }
        ours = entry.kind == "ours"
        python, program = (sys.executable, "ours.py") if ours else (settings.peers, "peers.py")
        log = self.folder / f"{name}.log"
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [python, str(HERE / program), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=self._environment(entry),
            )
        self.processes.append(process)
        return Contestant(entry, process, log)

    def _environment(self, entry: Entry) -> dict[str, str]:
        """One GPU on CUDA, one thread and no GPU on a CPU; a dry run compiles nothing."""
        found = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        if self.settings.device == "cpu":
            found |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        else:
            found["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        if self.settings.dry_run:
            found["TORCHDYNAMO_DISABLE"] = "1"
        path = entry.source if entry.kind == "ours" else self.settings.wheels
        if path:
            found["PYTHONPATH"] = os.pathsep.join(filter(None, (path, os.environ.get("PYTHONPATH"))))
        return found

    def _fill(self, present: list[Contestant]) -> None:
        """Load waiting trainers until the next one does not fit, or none is left."""
        while self.waiting and (count := self._fitting(present)):
            loading = [self.waiting.popleft() for _ in range(count)]
            if self.left_s < (1 - STARTING_SHARE) * self.settings.budget_s and present:
                for contestant in loading:
                    contestant.status, contestant.reason = "not run", "--budget was used up"
                    contestant.leave()
                continue
            begin = time.perf_counter()
            for contestant in loading:
                contestant.heat = len(self.heats)
                contestant.tell("load")
            full, alone = False, len(present) + len(loading) <= 2
            for contestant in loading:
                answer = contestant.answer(self.patience_s)
                self._say_loaded(contestant, answer, time.perf_counter() - begin)
                if answer is not None:
                    present.append(contestant)
                elif contestant.status == "out of memory" and not alone and contestant.tries < MORE_TRIES:
                    self._start_again(contestant)
                    full = True
            if full:
                return

    def _fitting(self, present: list[Contestant]) -> int:
        """How many trainers to load next: as many as find memory, and one in any case beside the reference."""
        reference = self.reference
        if reference is None or "free_gib" not in reference.figures:
            return 1  # the reference is loaded first; on a CPU all fit
        free, needed = present[-1].figures["free_gib"] if present else math.inf, reference.figures["peak_reserved_gib"]
        fitting = self.settings.parallel if not needed else free / (NEEDED * needed)
        return min(len(self.waiting), self.settings.parallel, max(int(fitting), int(len(present) < 2)))

    def _say_loaded(self, contestant: Contestant, answer: dict[str, Any] | None, seconds: float) -> None:
        """Note a trainer's first answer, and print it."""
        if answer is None:
            return self._say(f"{contestant.entry.name}: {contestant.status}: {contestant.reason}")
        contestant.status, contestant.first_loss = "ran", answer["first_loss"]
        self.reference = self.reference or contestant
        return self._say(f"{contestant.entry.name}: ready after {seconds:.0f} s")

    def _start_again(self, contestant: Contestant) -> None:
        """A new process for a trainer that found too little memory beside others: it waits for the next heat."""
        again = self.start(contestant.entry, f"again-{len(self.processes)}-{contestant.entry.kind}")
        contestant.process, contestant.log = again.process, again.log
        contestant.status, contestant.reason = "waits", ""
        contestant.tries += 1
        self.waiting.append(contestant)

    def _take_turns(self, present: list[Contestant], scribe: Contestant) -> None:
        """Let the present trainers and the matrix product take their turns."""
        spec, reference = self.spec, self.reference
        before = len(reference.speeds) if reference else 0
        duration = 0.0
        for turn in range(self.settings.turns if present else 1):
            if turn >= LEAST_TURNS and self.left_s < duration:
                break
            begin = time.perf_counter()
            for contestant in present:
                contestant.turn(spec.steps_a_turn, spec.batch * spec.seq_len, self.patience_s)
            scribe.turn(PRODUCTS_A_TURN, 2 * self.product**3, self.patience_s)
            duration = time.perf_counter() - begin
            line = ", ".join(f"{one.entry.name} {one.speeds[-1]:.0f}" for one in present if one.status == "ran")
            self._say(f"turn {turn + 1}: {line}")
        self.heats.append(reference.speeds[before:] if reference else [])

    def _say(self, line: str) -> None:
        print(f"  {line}", file=sys.stderr, flush=True)

    def _result(self, contestants: list[Contestant], facts: dict[str, Any], product_flops: float) -> dict[str, Any]:
        spec, reference = self.spec, self.reference
        rows = []
        for one in contestants:
            rows.append(_row(one, self.heats[one.heat], facts["flops_per_token"] / product_flops))
            if facts["datasheet_flops"] and "tokens_per_s" in rows[-1]:
                rows[-1]["mfu_datasheet"] = (
                    rows[-1]["tokens_per_s"] * facts["flops_per_token"] / facts["datasheet_flops"]
                )
            if reference and one.status == "ran":
                rows[-1] |= _disagreement(one, reference, spec.precision)
        return {
            "key": spec.key,
            "title": spec.title,
            "device": self.settings.target,
            "precision": spec.precision,
            "batch": spec.batch,
            "seq_len": spec.seq_len,
            "steps_a_turn": spec.steps_a_turn,
            "machine": facts["machine"],
            "parameters": facts["parameters"],
            "flops_per_token": facts["flops_per_token"],
            "product": self.product,
            "product_flops": product_flops,
            "datasheet_flops": facts["datasheet_flops"],
            "seconds": time.perf_counter() - self.begin,
            "reference": reference.entry.name if reference else None,
            "contestants": sorted(rows, key=lambda row: row["kind"] != "ours"),
        }


def _disagreement(one: Contestant, reference: Contestant, precision: str) -> dict[str, str]:
    """Status and reason of a trainer whose first loss is not that of the reference; empty if it is."""
    allowed = FLOAT8_TOLERANCE if "float8.recipe_name" in one.entry.overrides else LOSS_TOLERANCE[precision]
    apart = abs(one.first_loss - reference.first_loss)
    if apart <= allowed:  # NaN is not
        return {}
    return {"status": "disagrees", "reason": f"loss at step 1 is {apart:.4f} from that of {reference.entry.name}"}


def _row(one: Contestant, reference: list[float], products_per_token: float) -> dict[str, Any]:
    """The figures of one contestant; `reference` are the reference's speeds in the same heat."""
    row: dict[str, Any] = {
        "name": one.entry.name,
        "kind": one.entry.kind,
        "variant": one.entry.variant,
        "overrides": one.entry.overrides,
        "status": one.status,
        "reason": one.reason,
    }
    if not one.speeds:
        return row if one.status != "ran" else {**row, "status": "failed", "reason": "took no timed step"}
    speed = statistics.median(one.speeds)
    row |= {
        "tokens_per_s": speed,
        "turns": one.speeds,
        "tokens_per_cpu_s": statistics.median(one.cpu_speeds),
        "heat": one.heat,
        "reference_tokens_per_s": statistics.median(reference) if reference else None,
        "peak_gib": max(allocated for allocated, _ in one.peaks_gib),
        "peak_reserved_gib": max(reserved for _, reserved in one.peaks_gib),
        "mfu_product": speed * products_per_token,
        "first_loss": one.first_loss,
        "last_loss": one.losses[-1],
        "first_step_s": one.figures["first_step_s"],
        "torch": one.figures["torch"],
    }
    return row
