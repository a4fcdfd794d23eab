"""Compare the speed of titan_cpt and other trainers on the same work; writes the tables of docs/performance.md.

    python scripts/bench/speed/race.py --peers .venv-bench/bin/python [--quick] [--write docs/performance.md]

Every trainer is a process that stays alive: it loads the same weights, takes the same batches in the same order, in the
same precision, with one thread. They take turns (A B C A B C ...), so that other work on the machine affects all
equally; figures are medians over the turns. The first losses must agree, otherwise nothing is written. MFU is relative
to a matrix product of 2048^3 measured in the same turns.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BEGIN, END = "<!-- races: begin -->", "<!-- races: end -->"
STEPS_A_TURN = 3
LOSS_TOLERANCE = {"bfloat16": 0.02, "float32": 2e-4}

RACES: dict[str, dict[str, Any]] = {
    "A": {
        "title": "A: GPT-NeoX, 6 layers, width 128, 4 heads, vocabulary 50304",
        "family": "gpt_neox",
        "shape": {"layers": 6, "width": 128, "heads": 4, "mlp_width": 512, "vocab_size": 50304},
        "precision": "bfloat16",
    },
    "B": {
        "title": "B: GPT-NeoX, 8 layers, width 384, 6 heads, vocabulary 8192",
        "family": "gpt_neox",
        "shape": {"layers": 8, "width": 384, "heads": 6, "mlp_width": 1536, "vocab_size": 8192},
        "precision": "bfloat16",
    },
    "B32": {
        "title": "B in float32",
        "family": "gpt_neox",
        "shape": {"layers": 8, "width": 384, "heads": 6, "mlp_width": 1536, "vocab_size": 8192},
        "precision": "float32",
    },
    "C": {
        "title": "C: Llama, 8 layers, width 384, 6 heads, vocabulary 8192",
        "family": "llama",
        "shape": {"layers": 8, "width": 384, "heads": 6, "kv_heads": 6, "mlp_width": 1024, "vocab_size": 8192},
        "precision": "bfloat16",
    },
}
# name -> (kind, compiled, whether glibc keeps freed memory)
OURS = {"titan_cpt": ("ours", False, True), "titan_cpt, compiled": ("ours", True, True)}
ALIKE = " with our allocator setting"
PEERS = {
    "gpt_neox": {
        "HF Trainer": ("hf_trainer", False, False),
        "litgpt, compiled": ("litgpt", True, False),
        "plain loop, compiled": ("plain", True, False),
        "litgpt, compiled" + ALIKE: ("litgpt", True, True),
        "plain loop, compiled" + ALIKE: ("plain", True, True),
    },
    "llama": {
        "HF Trainer": ("hf_trainer", False, False),
        "litgpt, compiled": ("litgpt", True, False),
        "torchtitan, compiled": ("torchtitan", True, False),
        "torchtitan, compiled" + ALIKE: ("torchtitan", True, True),
    },
}


@dataclass
class TrainerProcess:
    """The process of one trainer, and its results."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    first_loss: float = 0.0
    speeds: list[float] = field(default_factory=list)
    cpu_speeds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_gib: float = 0.0

    def hear(self) -> dict[str, Any]:
        """Its next answer."""
        assert self.process.stdout is not None, "it was started with a pipe"
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} exited; the end of its output:\n{self.log.read_text()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def turn(self, steps: int, tokens: int) -> None:
        """Let it take `steps` steps, and record their speed and losses."""
        assert self.process.stdin is not None, "it was started with a pipe"
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        answer = self.hear()
        self.speeds.append(steps * tokens / answer["seconds"])
        self.cpu_speeds.append(steps * tokens / answer["cpu_s"])
        self.losses += answer["losses"]
        self.peak_gib = answer["peak_gib"]


def start(name: str, python: str, program: str, options: dict[str, Any], folder: Path) -> TrainerProcess:
    """Start a trainer with one thread."""
    log = folder / f"{options['name']}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        [python, str(HERE / program), json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log.open("w"),
        text=True,
        env=environment,
    )
    return TrainerProcess(name, process, log)


def race(key: str, *, peers: str, turns: int, batch: int, only: str) -> dict[str, Any]:
    """Run all trainers of one shape, in turns."""
    spec, folder = RACES[key], Path(tempfile.mkdtemp(prefix="race-"))
    seq_len = 512
    common = {
        "folder": str(folder),
        "family": spec["family"],
        "shape": spec["shape"],
        "precision": spec["precision"],
        "batch": batch,
        "seq_len": seq_len,
        "steps": 2 + turns * STEPS_A_TURN,
        "lr": 3e-4,
    }
    plain = {**common, "compiled": False, "allocator": False}
    scribe = start("prepare", sys.executable, "ours.py", {**plain, "name": "prepare"}, folder)
    flops_per_token = scribe.hear()["flops_per_token"]
    scribe.process.wait()

    field_of: list[TrainerProcess] = []
    entries = {**OURS, **PEERS[spec["family"]]}
    for number, (name, (kind, compiled, allocator)) in enumerate(entries.items()):
        if only and kind not in (*only.split(","), "ours"):
            continue
        options = {**common, "name": f"{number}-{kind}", "kind": kind, "compiled": compiled, "allocator": allocator}
        python, program = (sys.executable, "ours.py") if kind == "ours" else (peers, "peers.py")
        field_of.append(start(name, python, program, options, folder))
        begin = time.perf_counter()
        field_of[-1].first_loss = field_of[-1].hear()["first_loss"]
        print(f"  {name}: ready after {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    gemm = start("gemm", peers, "peers.py", {**plain, "name": "gemm", "kind": "gemm"}, folder)
    gemm.hear()
    agree(field_of, LOSS_TOLERANCE[spec["precision"]])
    for turn in range(turns):
        for trainer in field_of:
            trainer.turn(STEPS_A_TURN, batch * seq_len)
        gemm.turn(10, 2 * 2048**3)
        line = ", ".join(f"{c.name} {c.speeds[-1]:.0f}" for c in field_of)
        print(f"  turn {turn + 1}: {line}", file=sys.stderr, flush=True)
    for trainer in (*field_of, gemm):
        assert trainer.process.stdin is not None, "it was started with a pipe"
        trainer.process.stdin.close()
        trainer.process.kill()
        trainer.process.wait()
    shutil.rmtree(folder)
    return {
        "key": key,
        "title": spec["title"],
        "precision": spec["precision"],
        "flops_per_token": flops_per_token,
        "gemm_flops": statistics.median(gemm.speeds),
        "gemm_cpu_flops": statistics.median(gemm.cpu_speeds),
        "contestants": [
            {
                "name": c.name,
                "tokens_per_s": statistics.median(c.speeds),
                "tokens_per_cpu_s": statistics.median(c.cpu_speeds),
                "peak_gib": c.peak_gib,
                "first_loss": c.first_loss,
                "last_loss": c.losses[-1],
            }
            for c in field_of
        ],
    }


def agree(trainers: list[TrainerProcess], tolerance: float) -> None:
    """Exit unless all first losses agree: a trainer with another loss does other work."""
    losses = {c.name: c.first_loss for c in trainers}
    if max(losses.values()) - min(losses.values()) > tolerance:
        sys.exit(f"the losses of the first step do not agree within {tolerance}: {losses}")


def table(result: dict[str, Any]) -> str:
    """The results of one shape as a Markdown table."""
    rows = result["contestants"]
    ours = max((row for row in rows if row["name"].startswith("titan_cpt")), key=lambda row: row["tokens_per_s"])
    lines = [
        f"### {result['title']}, {result['precision']}, sequence 512",
        "",
        f"A matrix product of 2048^3 in the same run: {result['gemm_flops'] / 1e9:.0f} GFLOP/s.",
        "",
        "| | tokens/s | our best / it | tokens per CPU second | peak GiB | MFU | loss at step 1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mfu = row["tokens_per_s"] * result["flops_per_token"] / result["gemm_flops"]
        lines.append(
            f"| {row['name']} | {row['tokens_per_s']:.0f} | {ours['tokens_per_s'] / row['tokens_per_s']:.2f} "
            f"| {row['tokens_per_cpu_s']:.0f} | {row['peak_gib']:.2f} | {mfu:.1%} | {row['first_loss']:.4f} |"
        )
    return "\n".join(lines)


def write_into(path: Path, text: str) -> None:
    """Replace the text between the two markers of a page."""
    before, rest = path.read_text().split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{text}\n{rest[rest.index(END) :]}")


def machine() -> str:
    """Processor, number of cores and load of this machine."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


def main() -> None:
    """Run the selected shapes; print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", required=True, help="Python of the virtual environment with requirements.txt")
    parser.add_argument("--races", default=",".join(RACES), help="shapes, comma-separated, of " + ", ".join(RACES))
    parser.add_argument(
        "--only", default="", help="only these other trainers, comma-separated: hf_trainer, litgpt, plain, torchtitan"
    )
    parser.add_argument(
        "--turns", type=int, default=5, help=f"turns of {STEPS_A_TURN} steps for each trainer (default 5)"
    )
    parser.add_argument("--batch", type=int, default=8, help="sequences per step (default 8)")
    parser.add_argument("--quick", action="store_true", help="A and B in 3 turns")
    parser.add_argument("--write", type=Path, help="page in which to replace the tables")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    keys, turns = (["A", "B"], 3) if options.quick else (options.races.split(","), options.turns)
    results = []
    for key in keys:
        print(f"shape {key}", file=sys.stderr, flush=True)
        results.append(race(key, peers=options.peers, turns=turns, batch=options.batch, only=options.only))
        print(table(results[-1]) + "\n", flush=True)
    head = f"Measured on {machine()}; {turns} turns of {STEPS_A_TURN} steps each, medians; one thread."
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if options.write:
        write_into(options.write, "\n\n".join([head, *(table(result) for result in results)]))


if __name__ == "__main__":
    main()
