"""Run train.sbatch and sweep.sbatch on a real Slurm with two nodes on this host; print a result for each scenario.

    python scripts/slurm/try_on_two_nodes.py [--tracking cgroup] [SCENARIO ...]

Needs slurmctld, slurmd and munged (Debian: apt-get install slurm-wlm munge), root, titan_cpt installed in this Python,
and about fifteen minutes. Slurm, data and runs are in a temporary folder; --keep does not remove it. Exit status: 0 if
every scenario passed, else 1.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from two_nodes import TwoNodes, descendants, wait_for

from titan_cpt.data.formats.indexed_writer import IndexedWriter

HERE = Path(__file__).resolve().parent
TOML = """
[job]
name = "run"
[model]
family = "gpt_neox"
size = "debug"
[datasets.text]
train = "text"
[training]
global_batch_size = 12
local_batch_size = 1
seq_len = 64
mixed_precision_param = "float32"
[checkpoint]
interval = 25
[metrics]
enable_tensorboard = false
log_freq = 5
[[stages]]
name = "only"
dataset = "text"
steps = 100_000
lr = { schedule = "constant", max = 1e-3 }
"""
SWEEP = TOML + "\n[sweep]\njob.seed = [0, 1]\n"
FEW_STEPS = ("--stages.only.steps", "60")


class Failed(Exception):
    """A scenario failed."""


def expect(what: str, found: object, right: object) -> None:
    """Compare a value with the expected one.

    Raises:
        Failed: names what differs.
    """
    if found != right:
        raise Failed(f"{what}: {found!r} and not {right!r}")


class Trial:
    """A folder to submit from, away from the repository, and the jobs submitted there."""

    def __init__(self, slurm: TwoNodes, folder: Path) -> None:
        self.slurm = slurm
        self.folder = folder
        folder.mkdir()
        (folder / "configs").mkdir()
        (folder / "configs" / "run.toml").write_text(TOML)
        (folder / "configs" / "sweep.toml").write_text(SWEEP)
        with IndexedWriter(folder / "text", 257) as writer:
            for page in sorted((HERE.parents[1] / "docs").glob("*.md")):
                writer.add_document(np.append(np.frombuffer(page.read_bytes(), dtype=np.uint8).astype(np.int64), 256))

    def submit(
        self,
        name: str,
        *options: str,
        words: tuple[str, ...] = (),
        nproc: str = "2",
        script: Path = HERE / "train.sbatch",
        **environment: str,
    ) -> str:
        """Submit train.sbatch for a run on two nodes, by default without GPUs; returns the job id."""
        given = {"NPROC": nproc, "MASTER_ADDR": "127.0.0.1", "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"}
        sbatch = (
            "sbatch",
            "--parsable",
            "--nodes=2",
            "--mem=1000",
            *options,
            *([] if "--gpus=3" in options else ["--gpus-per-node=0"]),
        )
        command = (*sbatch, str(script), "--config", "configs/run.toml", "--job.name", name, *words)
        return self.slurm.command(*command, cwd=self.folder, **given, **environment)

    def lines(self, name: str) -> list[dict[str, object]]:
        """A run's metrics.jsonl."""
        path = self.folder / "outputs" / name / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def steps(self, name: str) -> int:
        """The last training step written."""
        return max((int(str(line["step"])) for line in self.lines(name) if line["kind"] == "train"), default=0)

    def resumed(self, name: str) -> list[int]:
        """The steps from which the run resumed."""
        return [int(str(line["step"])) for line in self.lines(name) if line.get("name") == "resume"]

    def trains(self, name: str, beyond: int = 0) -> None:
        """Wait until the run has taken a step beyond the given one."""
        wait_for(lambda: self.steps(name) > beyond or self.idle(), 240, f"{name}: a step after {beyond}")
        if self.steps(name) <= beyond:
            raise Failed(f"{name}: ended before a step after {beyond}")

    def idle(self) -> bool:
        """Whether Slurm has no job left."""
        return not self.slurm.command("squeue", "-h", check=False)

    def output(self, job: str) -> str:
        """The output of the job, over all its starts."""
        return "".join(path.read_text(errors="replace") for path in self.folder.glob(f"slurm-*-{job}.out"))

    def queued_again(self, job: str, seconds: float = 90) -> None:
        """Wait until Slurm has put the job back into the queue."""
        wait_for(lambda: self.slurm.job(job, "Restarts") == "1", seconds, f"job {job} queued again")

    def ended(self, job: str, seconds: float = 240) -> str:
        """Wait until the job has ended; returns its state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL")
        wait_for(lambda: self.slurm.job(job, "JobState") in over, seconds, f"job {job} over")
        return self.slurm.job(job, "JobState")

    def saved_and_resumed(self, job: str, name: str) -> str:
        """Check that the run stopped with everything saved and resumed from that step; then cancel the job."""
        wait_for(lambda: self.resumed(name), 240, f"{name}: resumed")
        stops = [line for line in self.lines(name) if line.get("name") == "stop"]
        expect("stops with everything saved", len(stops), 1)
        self.trains(name, int(str(stops[0]["step"])))
        expect("resumed after step", self.resumed(name), [stops[0]["step"]])
        self.cancel(job)
        return f"saved after step {stops[0]['step']}, Restarts=1, resumed from there"

    def cancel(self, job: str) -> None:
        """Cancel the job and check that it is not queued again."""
        self.slurm.command("scancel", job)
        expect("state after scancel", self.ended(job), "CANCELLED")


def two_nodes(trial: Trial) -> str:
    """Two nodes x two processes train to the end; each node's logs are in the run's folder."""
    job = trial.submit("whole", words=FEW_STEPS, LOG_RANK="1")
    expect("state", trial.ended(job), "COMPLETED")
    expect("steps", trial.steps("whole"), 60)
    logs = trial.folder / "outputs" / "whole" / "logs" / f"slurm-{job}-start-0"
    names = sorted(re.sub("-[^-]*$", "", path.name) for path in logs.iterdir() if (path / "console.txt").exists())
    expect("logs", names, ["node-0", "node-1"])
    expect("CPUs of the job", trial.slurm.job(job, "NumCPUs"), "8")
    return "COMPLETED; logs of both nodes kept; the job has all 8 CPUs"


def time_limit(trial: Trial) -> str:
    """Slurm sends SIGUSR1 to the batch script before the time limit."""
    job = trial.submit("limit", "--time=2", "--signal=B:USR1@60")
    trial.trains("limit")
    trial.queued_again(job, 150)
    return trial.saved_and_resumed(job, "limit")


def time_limit_unanswered(trial: Trial) -> str:
    """The run is still training at the time limit: Slurm ends the job, which is queued again nevertheless."""
    setup = trial.folder / "deaf.sh"
    setup.write_text('scancel() { echo "not passed on: $*"; }\n')  # this is sourced by the batch script
    job = trial.submit("late", "--time=1", "--signal=B:USR1@20", TITAN_CPT_SETUP=str(setup))
    trial.trains("late")
    trial.queued_again(job, 200)
    wait_for(lambda: trial.resumed("late"), 240, "late: resumed")
    expect("message printed", "the time is up before everything was saved" in trial.output(job), True)
    begun = trial.resumed("late")
    trial.cancel(job)
    return f"Restarts=1, resumed from step {begun[0]}"


def _preempted(trial: Trial, name: str, partition: str) -> str:
    job = trial.submit(name, f"--partition={partition}")
    trial.trains(name)
    options = ("--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
    other = trial.slurm.command("sbatch", *options, "--wrap", "sleep 5", cwd=trial.folder)
    trial.queued_again(job)
    expect("state of the preemptor", trial.ended(other), "COMPLETED")
    return trial.saved_and_resumed(job, name)


def preemption_with_grace(trial: Trial) -> str:
    """GraceTime=60: Slurm sends SIGTERM to the step and lets the job run on."""
    return _preempted(trial, "grace", "low")


def preemption_without_grace(trial: Trial) -> str:
    """GraceTime=0: Slurm ends the job, KillWait=30 s after SIGTERM."""
    return _preempted(trial, "nograce", "nograce")


def cancelled(trial: Trial) -> str:
    """After scancel by the user the run saves everything, and the job is not queued again."""
    job = trial.submit("cancelled")
    trial.trains("cancelled")
    trial.cancel(job)
    time.sleep(8)
    expect("state later", trial.slurm.job(job, "JobState"), "CANCELLED")
    expect("stops", [line["name"] for line in trial.lines("cancelled") if line["kind"] == "event"][-1:], ["stop"])
    return "CANCELLED, Restarts=0, everything saved"


def requeued_by_hand(trial: Trial) -> str:
    """The user requeues a running job with scontrol requeue."""
    job = trial.submit("requeue")
    trial.trains("requeue")
    trial.slurm.command("scontrol", "requeue", job)
    trial.queued_again(job)
    return trial.saved_and_resumed(job, "requeue")


def node_dies(trial: Trial) -> str:
    """The daemon and all processes of the second node are killed."""
    job = trial.submit("node")
    trial.trains("node", 30)
    trial.slurm.kill_node("n1")
    trial.queued_again(job, 150)
    trial.slurm.start_node("n1")
    wait_for(lambda: trial.resumed("node"), 240, "node: resumed")
    begun = trial.resumed("node")
    trial.cancel(job)
    return f"queued again, resumed from step {begun[0]} (checkpoint.interval 25) once the node was back"


def _kill_a_rank(trial: Trial, node: str) -> None:
    ranks = [pid for stepd in trial.slurm.stepds(node) for pid in descendants(stepd)]
    ranks = [pid for pid in ranks if b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    os.kill(ranks[0], signal.SIGKILL)


def transient_failures(trial: Trial) -> str:
    """A process dies, twice, with MAX_FAILURES=1: queued again once."""
    job = trial.submit("failures", MAX_FAILURES="1")
    trial.trains("failures", 30)
    _kill_a_rank(trial, "n1")
    trial.queued_again(job)
    wait_for(lambda: trial.resumed("failures"), 240, "failures: resumed")
    trial.trains("failures", trial.resumed("failures")[0] + 10)
    _kill_a_rank(trial, "n0")
    expect("state", trial.ended(job), "FAILED")
    expect("Restarts", trial.slurm.job(job, "Restarts"), "1")
    return "queued again after the first, FAILED after the second"


def restarts_inside_the_job(trial: Trial) -> str:
    """A process dies with MAX_RESTARTS=1: torchrun restarts all processes of both nodes without a requeue by Slurm."""
    job = trial.submit("restarts", words=("--stages.only.steps", "150"), MAX_RESTARTS="1")
    trial.trains("restarts", 30)
    _kill_a_rank(trial, "n1")
    expect("state", trial.ended(job), "COMPLETED")
    expect("Restarts", trial.slurm.job(job, "Restarts"), "0")
    expect("resumes", len(trial.resumed("restarts")), 1)
    return f"COMPLETED, Restarts=0, resumed from step {trial.resumed('restarts')[0]}"


def mistake(trial: Trial) -> str:
    """A job with a mistake in its config is not queued again."""
    job = trial.submit("mistake", words=("--training.seq_len", "none"))
    expect("state", trial.ended(job), "FAILED")
    expect("exit status, restarts", (trial.slurm.job(job, "ExitCode"), trial.slurm.job(job, "Restarts")), ("2:0", "0"))
    expect("messages", trial.output(job).count("training.seq_len: must be an integer"), 1)
    return "FAILED with status 2, Restarts=0, printed once for both nodes"


def nodes_of_different_size(trial: Trial) -> str:
    """Two GPUs on one node, one on the other (they exist for Slurm only): a process for each."""
    copy = trial.folder / "uneven.sbatch"  # as docs/slurm.md says: --gpus excludes the script's --gpus-per-node
    copy.write_text("".join(line for line in (HERE / "train.sbatch").open() if "#SBATCH --gpus-per-node" not in line))
    root = str(HERE.parents[1])
    job = trial.submit("uneven", "--gpus=3", words=FEW_STEPS, nproc="gpu", script=copy, TITAN_CPT_ROOT=root)
    expect("state", trial.ended(job), "COMPLETED")
    starts = [line for line in trial.lines("uneven") if line.get("name") == "start"]
    expect("processes", starts[0]["world_size"], 3)
    return "three processes on two nodes"


def sweep_as_an_array(trial: Trial) -> str:
    """Two runs; the task whose job id is that of the array gets SIGUSR1, and only this task is queued again."""
    given = {
        "NPROC": "2",
        "VIRTUAL_ENV": sys.prefix,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
    }
    options = ("--parsable", "--array=0-1", "--gpus=0", "--cpus-per-task=2", "--mem=1000")
    words = (str(HERE / "sweep.sbatch"), "configs/sweep.toml", "--stages.only.steps", "250")
    array = trial.slurm.command("sbatch", *options, *words, cwd=trial.folder, **given)
    trial.trains("run/seed-0")
    trial.trains("run/seed-1")
    trial.slurm.command("scancel", "--batch", "--signal=USR1", f"{array}_1")
    trial.queued_again(f"{array}_1")
    expect("states", [trial.ended(f"{array}_{task}") for task in (0, 1)], ["COMPLETED"] * 2)
    expect("restarts", [trial.slurm.job(f"{array}_{task}", "Restarts") for task in (0, 1)], ["0", "1"])
    expect("steps", [trial.steps(f"run/seed-{task}") for task in (0, 1)], [250, 250])
    return "both COMPLETED; Restarts 0 and 1"


SCENARIOS: tuple[Callable[[Trial], str], ...] = (
    two_nodes,
    time_limit,
    time_limit_unanswered,
    preemption_with_grace,
    preemption_without_grace,
    cancelled,
    requeued_by_hand,
    node_dies,
    transient_failures,
    restarts_inside_the_job,
    mistake,
    nodes_of_different_size,
    sweep_as_an_array,
)


def run(scenario: Callable[[Trial], str], slurm: TwoNodes, folder: Path) -> bool:
    """Run a scenario and print its result; returns whether it passed."""
    began = time.monotonic()
    trial = Trial(slurm, folder)
    try:
        result = scenario(trial)
        verdict = "ok"
    except (Failed, TimeoutError, RuntimeError, IndexError) as error:
        result = f"{type(error).__name__}: {error}"
        verdict = "FAILED"
    slurm.end_jobs()
    words = (inspect.getdoc(scenario) or "").replace("\n", " ")
    print(
        f"{verdict:<7}{scenario.__name__:<25} {time.monotonic() - began:4.0f} s  {words}\n{'':<40}{result}", flush=True
    )
    if verdict != "ok":
        for path in sorted(folder.glob("slurm-*.out")):
            print(path.read_text(errors="replace")[-4000:])
    return verdict == "ok"


def main() -> int:
    """Start Slurm, run the scenarios, stop Slurm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [scenario.__name__ for scenario in SCENARIOS]
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"default: all: {', '.join(names)}")
    parser.add_argument(
        "--tracking", choices=("linuxproc", "cgroup"), default="linuxproc", help="Slurm's ProctrackType"
    )
    parser.add_argument("--keep", action="store_true", help="do not remove the temporary folder")
    options = parser.parse_args()
    unknown = sorted(set(options.scenarios) - set(names))
    if unknown:
        parser.error(f"no such scenario: {', '.join(unknown)}; there are {', '.join(names)}")
    missing = [tool for tool in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(tool) is None]
    if missing:
        parser.error(f"not installed: {', '.join(missing)}; on Debian: apt-get install slurm-wlm munge")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the daemons are stopped
    folder = Path(tempfile.mkdtemp(prefix="titan_cpt-slurm-"))
    try:
        with TwoNodes(folder / "slurm", options.tracking) as slurm:
            print(f"{slurm.command('sinfo', '--version')}, ProctrackType=proctrack/{options.tracking}", flush=True)
            wanted = [scenario for scenario in SCENARIOS if scenario.__name__ in (options.scenarios or names)]
            good = [run(scenario, slurm, folder / scenario.__name__) for scenario in wanted]
        print(f"{sum(good)} of {len(good)} scenarios as they should be")
        return int(not all(good))
    finally:
        if options.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
