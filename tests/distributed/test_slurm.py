"""scripts/slurm/train.sbatch under stand-ins for srun and scontrol: two nodes, each a torchrun of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from parity_launch import ROOT, TOML, make_data, record

SBATCH = ROOT / "scripts" / "slurm" / "train.sbatch"

# Runs the command once for each of two nodes and passes SIGTERM on, as srun does; ends with the highest status.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_NODEID=1 SLURM_LOCALID=0 "$@" & second=$!
trap 'kill -TERM $first $second' TERM
highest=0
for node in $first $second; do
    while :; do
        wait $node; status=$?
        kill -0 $node 2>/dev/null || break
    done
    wait $node; status=$?
    ((status > highest)) && highest=$status
done
exit $highest
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) printf '127.0.0.1\\n127.0.0.1\\n' ;;
    requeue) echo "$2" >>requeued ;;
esac
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder to submit from, with data, a config of many steps, and the stand-ins in `tools`."""
    make_data(tmp_path)
    (tmp_path / "run.toml").write_text(
        TOML.replace("steps = 3", "steps = 100").replace("local_batch_size = 8", "local_batch_size = 4")
    )
    (tmp_path / "run_train.sh").symlink_to(ROOT / "run_train.sh")
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
        tool = tmp_path / "tools" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(script)
        tool.chmod(0o755)
    return tmp_path


def submit(cluster: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    """Start the batch script as Slurm would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    given = {
        **os.environ,
        "PATH": f"{cluster / 'tools'}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": sys.prefix,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_PORT": port,
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_SUBMIT_DIR": str(cluster),
        **environment,
    }
    return subprocess.Popen(
        [str(SBATCH), *words], env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_steps(cluster: Path, job: subprocess.Popen[str]) -> None:
    """Until the run has written its first steps."""
    until = time.monotonic() + 120
    written = cluster / "outputs" / "base" / "metrics.jsonl"
    while time.monotonic() < until and not (written.exists() and '"kind": "train"' in written.read_text()):
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.2)


def test_a_signal_before_the_time_is_up_saves_and_queues_again(cluster: Path) -> None:
    """Two torchruns stop on SIGUSR1 with status 75, the job is queued again, and the next one goes on where it was."""
    job = submit(cluster, "--config", "run.toml")
    wait_for_steps(cluster, job)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=120)

    assert job.returncode == 75, output
    assert (cluster / "requeued").read_text() == "4711\n"
    lines = record(cluster, "base")
    assert lines[-1]["name"] == "stop"
    steps = max(line["step"] for line in lines if line["kind"] == "train")

    shorter = ("--config", "run.toml", "--metrics.log_freq", "100")
    job = submit(cluster, *shorter, SLURM_RESTART_COUNT="1", MAX_RESTARTS="1")
    output, _ = job.communicate(timeout=240)

    assert job.returncode == 0, output
    resumed = [line for line in record(cluster, "base") if line.get("name") == "resume"]
    assert [line["step"] for line in resumed] == [steps]
    assert (cluster / "requeued").read_text() == "4711\n"


def test_a_mistake_is_not_queued_again(cluster: Path) -> None:
    """Status 2 of the program is the job's, once and for all."""
    job = submit(cluster, "--config", "run.toml", "--training.seq_len", "none")
    output, _ = job.communicate(timeout=120)

    assert job.returncode == 2, output
    assert "training.seq_len" in output
    assert not (cluster / "requeued").exists()


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    """The batch script is clean."""
    done = subprocess.run(["shellcheck", str(SBATCH)], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout
