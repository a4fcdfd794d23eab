"""Run the trainers of one shape: start their processes, let them take turns, collect their figures.

On a GPU all trainers share the device's memory. One computes at a time, and an idle one keeps its weights, moments and
CUDA graphs only. If the next trainer would not fit beside them, those present take all their turns first and leave
(a heat); the reference, titan_cpt's first variant, stays and takes turns in every heat, so that ratios are always
those of trainers that ran in turns with it.
"""

from __future__ import annotations

import json
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
STARTING_SHARE = 0.75  # of --budget: after this much of it no further trainer starts
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
    """

    device: str
    target: str
    peers: str
    wheels: str
    turns: int
    dry_run: bool
    budget_s: float
    patience_s: float
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
    first_loss: float = 0.0
    speeds: list[float] = field(default_factory=list)
    cpu_speeds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peaks_gib: list[tuple[float, float]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def ask(self, request: str, patience_s: float) -> dict[str, Any] | None:
        """Send a line and return the answer; None, with status and reason set, if there is no usable one."""
        assert self.process.stdin is not None, "it was started with pipes"
        assert self.process.stdout is not None, "it was started with pipes"
        with suppress(BrokenPipeError):  # a process that has ended may have said why
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], patience_s)[0]:
            return self._failed(f"no answer within {patience_s:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            return self._failed(f"exited: {lines[-1][:300] if lines else 'without a message'}")
        answer: dict[str, Any] = json.loads(line)
        if "status" in answer:
            return self._failed(answer["reason"], answer["status"])
        self.figures |= {key: value for key, value in answer.items() if key not in ("losses", "seconds", "cpu_s")}
        return answer

    def _failed(self, reason: str, status: str = "failed") -> None:
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
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def race(spec: Race, entries: list[Entry], settings: Settings) -> dict[str, Any]:
    """Run all trainers of one shape, in turns; returns the figures, as in the JSON file."""
    with _temporary_folder(settings) as folder:
        contest = _Contest(spec, settings, folder)
        try:
            return contest.run(entries)
        finally:
            for process in contest.processes:
                process.kill()
                process.wait()


@contextmanager
def _temporary_folder(settings: Settings) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="race-", dir=settings.folder))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Contest:
    """One race under way."""

    def __init__(self, spec: Race, settings: Settings, folder: Path) -> None:
        self.spec, self.settings, self.folder = spec, settings, folder
        self.begin = time.perf_counter()
        self.processes: list[subprocess.Popen[str]] = []
        size = 8192 if settings.device == "cuda" else 2048
        self.product = size if not settings.dry_run else 256
        # The first step; then in every turn the timed ones, and on CUDA one that is not timed.
        self.steps = 2 + settings.turns * (spec.steps_a_turn + (settings.device == "cuda"))

    @property
    def left_s(self) -> float:
        """Seconds that are left of the budget."""
        return self.settings.budget_s - (time.perf_counter() - self.begin)

    def run(self, entries: list[Entry]) -> dict[str, Any]:
        """Start, take turns, report."""
        scribe = self.start(Entry("prepare", "ours"), "prepare")
        waiting = deque(self.start(entry, f"{number}-{entry.kind}") for number, entry in enumerate(entries))
        facts = scribe.ask("load", self.settings.patience_s)
        if facts is None:
            tail = scribe.log.read_text(errors="replace")[-3000:]
            sys.exit(f"{self.spec.key}: the inputs could not be prepared: {scribe.reason}\n{tail}")
        all_contestants = list(waiting)
        reference, scribe.status = waiting[0], "ran"
        if scribe.ask("load", self.settings.patience_s) is None:
            sys.exit(f"{self.spec.key}: no matrix product could be timed: {scribe.reason}")
        heats: list[dict[str, Any]] = []
        present: list[Contestant] = []
        while waiting:
            present = [reference] if reference.status == "ran" else []
            self._fill(present, waiting, reference, len(heats))
            heats.append(self._turns(present, scribe))
            for contestant in present:
                if contestant is not reference:
                    contestant.leave()
        return self._result(all_contestants, reference, facts, scribe, heats)

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
        process = subprocess.Popen(
            [python, str(HERE / program), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
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

    def _fill(self, present: list[Contestant], waiting: deque[Contestant], reference: Contestant, heat: int) -> None:
        """Load waiting trainers until the next one does not fit, or none is left."""
        while waiting:
            contestant = waiting[0]
            late = self.left_s < (1 - STARTING_SHARE) * self.settings.budget_s
            if late and contestant is not reference:
                contestant.status, contestant.reason = "not run", "--budget was used up"
                contestant.leave()
                waiting.popleft()
                continue
            if len(present) > 1 and not self._fits(present[-1], reference):
                return
            begin = time.perf_counter()
            contestant.heat = heat
            answer = contestant.ask("load", min(self.settings.patience_s, max(self.left_s, 30.0)))
            if answer is None and contestant.status == "out of memory" and len(present) > 1:
                number = f"again-{len(self.processes)}-{contestant.entry.kind}"
                again = self.start(contestant.entry, number)
                contestant.process, contestant.log = again.process, again.log
                contestant.status, contestant.reason = "waits", ""
                return
            waiting.popleft()
            if answer is None:
                self._say(f"{contestant.entry.name}: {contestant.status}: {contestant.reason}")
                continue
            contestant.status, contestant.first_loss = "ran", answer["first_loss"]
            present.append(contestant)
            self._say(f"{contestant.entry.name}: ready after {time.perf_counter() - begin:.0f} s")

    @staticmethod
    def _fits(newest: Contestant, reference: Contestant) -> bool:
        """Whether one more trainer finds memory on the device. On a CPU all are loaded at once."""
        free = newest.figures.get("free_gib")
        return free is None or free > NEEDED * reference.figures.get("peak_reserved_gib", 0.0)

    def _turns(self, present: list[Contestant], scribe: Contestant) -> dict[str, Any]:
        """Let the present trainers take their turns; the reference's and the product's speeds in this heat."""
        spec, patience_s = self.spec, self.settings.patience_s
        at = {id(one): len(one.speeds) for one in (*present, scribe)}
        duration = 0.0
        for turn in range(self.settings.turns if present else 0):
            if turn >= 2 and self.left_s < duration:
                break
            begin = time.perf_counter()
            for contestant in present:
                contestant.turn(spec.steps_a_turn, spec.batch * spec.seq_len, patience_s)
            scribe.turn(PRODUCTS_A_TURN, 2 * self.product**3, patience_s)
            duration = time.perf_counter() - begin
            line = ", ".join(f"{one.entry.name} {one.speeds[-1]:.0f}" for one in present if one.status == "ran")
            self._say(f"turn {turn + 1}: {line}")
        return {id(one): one.speeds[at[id(one)] :] for one in present}

    def _say(self, line: str) -> None:
        print(f"  {line}", file=sys.stderr, flush=True)

    def _result(
        self,
        contestants: list[Contestant],
        reference: Contestant,
        facts: dict[str, Any],
        scribe: Contestant,
        heats: list[dict[str, Any]],
    ) -> dict[str, Any]:
        spec = self.spec
        product = _median(scribe.speeds)
        result = {
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
            "product_flops": product,
            "datasheet_flops": facts["datasheet_flops"],
            "seconds": time.perf_counter() - self.begin,
            "reference": reference.entry.name,
        }
        tolerance = LOSS_TOLERANCE[spec.precision]
        rows = []
        for one in contestants:
            compared = heats[one.heat].get(id(reference), []) if one.heat < len(heats) else []
            rows.append(_row(one, compared, facts, product))
            allowed = FLOAT8_TOLERANCE if "float8.recipe_name" in one.entry.overrides else tolerance
            apart = abs(one.first_loss - reference.first_loss)
            if one.status == "ran" and reference.status == "ran" and not apart <= allowed:
                rows[-1] |= {"status": "disagrees", "reason": f"loss at step 1 is {apart:.4f} from the reference's"}
        return {**result, "contestants": rows}


def _row(one: Contestant, reference: list[float], facts: dict[str, Any], product: float) -> dict[str, Any]:
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
    speed = _median(one.speeds)
    row |= {
        "tokens_per_s": speed,
        "turns": one.speeds,
        "tokens_per_cpu_s": _median(one.cpu_speeds),
        "heat": one.heat,
        "reference_tokens_per_s": _median(reference) if reference else None,
        "peak_gib": max(allocated for allocated, _ in one.peaks_gib),
        "peak_reserved_gib": max(reserved for _, reserved in one.peaks_gib),
        "mfu_product": speed * facts["flops_per_token"] / product,
        "first_loss": one.first_loss,
        "last_loss": one.losses[-1],
        "first_step_s": one.figures["first_step_s"],
        "torch": one.figures["torch"],
    }
    if facts["datasheet_flops"]:
        row["mfu_datasheet"] = speed * facts["flops_per_token"] / facts["datasheet_flops"]
    return row


def _median(values: list[float]) -> float:
    return statistics.median(values)
