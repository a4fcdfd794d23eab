"""scripts/slurm/train.sbatch and sweep.sbatch under stand-ins for Slurm's commands.

The stand-ins do what Slurm 22.05.8 was seen to do (scripts/slurm/try_on_two_nodes.py runs the scripts on the real one;
its log is in docs/slurm.md): srun answers SIGTERM by killing the step; `scancel --signal=TERM JOB.STEP` sends it to the
step's tasks; scancel of a job sends SIGTERM to the batch script and to the tasks, while the job is COMPLETING;
`scontrol requeue` then queues a cancelled job again; `scontrol show job` shows a command with its arguments; a plain
number of an array's last task means the whole array.
"""

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

SCRIPTS = ROOT / "scripts" / "slurm"

# Runs the command once for each of two nodes; killed by SIGTERM, with the tasks; ends with the highest status.
SRUN = """#!/usr/bin/env bash
echo "$@" >>"$FOLDER/srun-calls"
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 SLURM_LOCALID=0 "$@" & tasks=$!
SLURM_NODEID=1 SLURM_LOCALID=0 "$@" & tasks+=" $!"
echo "$tasks" >"$FOLDER/step"
trap 'kill -KILL $tasks; rm "$FOLDER/step"; exit 137' TERM
highest=0
for task in $tasks; do
    wait "$task"; status=$?
    ((status > highest)) && highest=$status
done
rm "$FOLDER/step"
exit $highest
"""
SCANCEL = """#!/usr/bin/env bash
[[ $1 == --signal=TERM && $2 == *.0 ]] && kill -TERM $(<"$FOLDER/step")
"""
SQUEUE = """#!/usr/bin/env bash
case "$*" in
    *-s*) [[ ! -f $FOLDER/step ]] || echo "4711.0" ;;
    *%T*) cat "$FOLDER/state" 2>/dev/null || echo RUNNING ;;
    *%e*) cat "$FOLDER/ends" 2>/dev/null || echo N/A ;;
esac
"""
SCONTROL = """#!/usr/bin/env bash
case "$*" in
    "show hostnames"*) printf '127.0.0.1\\n127.0.0.1\\n' ;;
    *"show job"*) echo "JobId=4711 Command=$SUBMITTED --config configs/x.toml WorkDir=/ StdIn=/dev/null" ;;
    requeue*) echo "$2" >>"$FOLDER/requeued" ;;
esac
"""
# In place of run_train.sh: prints its arguments once both nodes handle SIGTERM; exits with the next of the given
# statuses.
RUN_TRAIN = """#!/usr/bin/env bash
trap 'exit 75' TERM
if [[ $SLURM_NODEID == 1 ]]; then
    touch "$FOLDER/node-1-is-ready"
else
    while [[ ! -e $FOLDER/node-1-is-ready || ! -s $FOLDER/step ]]; do sleep 0.02; done
    echo "NPROC=$NPROC MASTER_ADDR=$MASTER_ADDR FROM_SETUP=${FROM_SETUP:-} $*"
fi
[[ $STATUS == wait ]] && while :; do sleep 0.02; done
exit "$STATUS"
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder to submit from, with data, a config of many steps, and the stand-ins in `tools`."""
    make_data(tmp_path)
    (tmp_path / "run.toml").write_text(
        TOML.replace("steps = 3", "steps = 100").replace("local_batch_size = 8", "local_batch_size = 4")
    )
    stand_ins = {"srun": SRUN, "scancel": SCANCEL, "squeue": SQUEUE, "scontrol": SCONTROL}
    for name, script in stand_ins.items():
        add(tmp_path / "tools" / name, script)
    return tmp_path


@pytest.fixture
def repository(cluster: Path) -> Path:
    """A repository of the scripts only, whose run_train.sh prints how it was called; its path has a space."""
    repository = cluster / "a repository"
    shutil.copytree(SCRIPTS, repository / "scripts" / "slurm")
    add(repository / "run_train.sh", RUN_TRAIN)
    return repository


def add(path: Path, script: str) -> None:
    """Make `path` an executable file."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)


def submit(
    cluster: Path, *words: str, repository: Path = ROOT, script: str = "train.sbatch", **environment: str
) -> subprocess.Popen[str]:
    """Start the batch script as Slurm does: a copy of it, from Slurm's spool, in the folder where it was submitted."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    submitted = repository / "scripts" / "slurm" / script
    copy = cluster / "spool" / "job04711" / "slurm_script"
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(submitted, copy)
    given = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
        "PATH": f"{cluster / 'tools'}{os.pathsep}{os.environ['PATH']}",
        "FOLDER": str(cluster),
        "SUBMITTED": str(submitted),
        "VIRTUAL_ENV": sys.prefix,
        "OMP_NUM_THREADS": "1",
        "MASTER_PORT": port,
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "titan_cpt",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_CPUS_PER_NODE": "64(x3),48,96",
        "SLURM_SUBMIT_DIR": str(cluster),
        **environment,
    }
    return subprocess.Popen(
        [str(copy), *words], env=given, cwd=cluster, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished(cluster: Path, *words: str, **how: str | Path) -> tuple[int, str, list[str]]:
    """The status of a job in a repository of stand-ins, what it printed, and which jobs were queued again so far."""
    job = submit(cluster, *words, **how)  # type: ignore[arg-type]
    output, _ = job.communicate(timeout=60)
    requeued = cluster / "requeued"
    return job.returncode, output, requeued.read_text().split() if requeued.exists() else []


def wait_for_steps(cluster: Path, job: subprocess.Popen[str]) -> None:
    """Until the run has written its first steps."""
    until = time.monotonic() + 120
    written = cluster / "outputs" / "base" / "metrics.jsonl"
    while time.monotonic() < until and not (written.exists() and '"kind": "train"' in written.read_text()):
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.2)


def test_a_signal_before_the_time_limit_saves_and_queues_again(cluster: Path) -> None:
    """Two torchruns stop on SIGUSR1 with status 75, the job is queued again, and its next start resumes the run."""
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
    job = submit(cluster, *shorter, SLURM_RESTART_COUNT="1", MAX_REQUEUES="1")
    output, _ = job.communicate(timeout=240)

    assert job.returncode == 0, output
    resumed = [line for line in record(cluster, "base") if line.get("name") == "resume"]
    assert [line["step"] for line in resumed] == [steps]
    assert (cluster / "requeued").read_text() == "4711\n"


def test_a_config_error_is_not_queued_again(cluster: Path) -> None:
    """The job exits with 2, the status of titan_cpt."""
    job = submit(cluster, "--config", "run.toml", "--training.seq_len", "none")
    output, _ = job.communicate(timeout=120)

    assert job.returncode == 2, output
    assert "training.seq_len" in output
    assert not (cluster / "requeued").exists()


def test_a_job_cancelled_by_the_user_is_not_queued_again(cluster: Path, repository: Path) -> None:
    """Slurm sends SIGTERM to the batch script and to the tasks, which save and exit with 75."""
    job = submit(cluster, repository=repository, STATUS="wait")
    assert job.stdout is not None
    assert job.stdout.readline().startswith("NPROC=gpu")
    (cluster / "state").write_text("COMPLETING")
    job.send_signal(signal.SIGTERM)
    assert job.stdout.readline() == "titan_cpt: SIGTERM: Slurm is ending this job\n"
    for task in (cluster / "step").read_text().split():
        os.kill(int(task), signal.SIGTERM)
    output, _ = job.communicate(timeout=60)

    assert job.returncode == 75, output
    assert not (cluster / "requeued").exists()


def test_a_time_limit_reached_before_everything_is_saved_queues_again(cluster: Path, repository: Path) -> None:
    """SIGUSR1 came too late for the save: Slurm ends the job, and the run resumes from its last checkpoint."""
    (cluster / "ends").write_text("1970-01-01T00:00:00")
    add(cluster / "tools" / "scancel", "#!/usr/bin/env bash\n")
    job = submit(cluster, repository=repository, STATUS="wait")
    assert job.stdout is not None
    assert job.stdout.readline().startswith("NPROC=gpu")
    job.send_signal(signal.SIGUSR1)
    assert "SIGUSR1: signaling the run to save and stop" in job.stdout.readline()
    (cluster / "state").write_text("COMPLETING")
    job.send_signal(signal.SIGTERM)
    assert job.stdout.readline() == "titan_cpt: SIGTERM: Slurm is ending this job\n"
    for task in (cluster / "step").read_text().split():
        os.kill(int(task), signal.SIGTERM)
    output, _ = job.communicate(timeout=60)

    assert "time limit reached before everything was saved" in output
    assert (cluster / "requeued").read_text() == "4711\n"


def test_consecutive_failures_are_queued_again_up_to_max_failures(cluster: Path, repository: Path) -> None:
    """With MAX_FAILURES=2: twice, not a third time; a stop with status 75 in between resets the count."""
    numbers = []
    for status in (1, 137, 75, 1, 134, 1):
        code, output, requeued = finished(cluster, repository=repository, STATUS=str(status), MAX_FAILURES="2")
        numbers.append(len(requeued))

        assert code == status, output
    assert numbers == [1, 2, 3, 4, 5, 5]
    assert not list(cluster.glob(".slurm-*"))


@pytest.mark.parametrize(("status", "state"), [("0", "RUNNING"), ("2", "RUNNING"), ("1", "COMPLETING")])
def test_success_user_errors_and_jobs_ended_by_slurm_are_not_queued_again(
    cluster: Path, repository: Path, status: str, state: str
) -> None:
    """Slurm itself queues a preempted job again, and a job whose node failed."""
    (cluster / "state").write_text(state)
    code, output, requeued = finished(cluster, repository=repository, STATUS=status)

    assert code == int(status), output
    assert requeued == []


def test_a_task_of_an_array_queues_itself_and_not_the_array(cluster: Path, repository: Path) -> None:
    """The job id of the last task is that of the array, for which scontrol would act on all tasks."""
    array = {"SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "8"}
    add(cluster / "tools" / "titan-cpt", '#!/usr/bin/env bash\n[[ $SLURM_NODEID == 1 ]] || echo "$@"\nexit 75\n')
    code, output, requeued = finished(cluster, "my sweep.toml", repository=repository, script="sweep.sbatch", **array)

    assert (code, requeued) == (75, ["4711_8"]), output
    launch = str(repository / "run_train.sh").replace(" ", "\\ ")
    assert output.splitlines()[0] == f"sweep my sweep.toml --launch {launch}"


def test_a_sweep_without_an_array_is_refused(cluster: Path, repository: Path) -> None:
    """One job would train all of its runs."""
    code, output, _ = finished(cluster, "sweep.toml", repository=repository, script="sweep.sbatch")

    assert code == 2
    assert "submit this as an array" in output


def test_the_step_gets_all_cores_and_the_options_of_the_setup_file(cluster: Path, repository: Path) -> None:
    """The cores of the smallest node; the setup file is sourced, and its launcher precedes run_train.sh."""
    setup = cluster / "setup.sh"
    setup.write_text("export FROM_SETUP=yes\nsrun_options=(--container-image=x)\nlauncher=(env LAUNCHED=yes)\nfalse\n")
    code, output, _ = finished(
        cluster, "--config", "a b", repository=repository, STATUS="0", TITAN_CPT_SETUP=str(setup)
    )
    (call,) = (cluster / "srun-calls").read_text().splitlines()

    assert code == 0, output
    assert output == "NPROC=gpu MASTER_ADDR=127.0.0.1 FROM_SETUP=yes --config a b\n"
    assert "--cpus-per-task=48 " in call
    assert f"--container-image=x env LAUNCHED=yes {repository}/run_train.sh --config a b" in call


def test_the_step_gets_the_cpus_per_task_of_sbatch(cluster: Path, repository: Path) -> None:
    """srun does not inherit --cpus-per-task (Slurm 22.05 and newer)."""
    finished(cluster, repository=repository, STATUS="0", SLURM_CPUS_PER_TASK="16")

    assert "--cpus-per-task=16 " in (cluster / "srun-calls").read_text()


def test_a_repository_that_is_not_found_is_a_user_error(cluster: Path) -> None:
    """Status 2, and the name of the variable to set."""
    code, output, requeued = finished(cluster, TITAN_CPT_ROOT=str(cluster / "nowhere"))

    assert (code, requeued) == (2, [])
    assert "set TITAN_CPT_ROOT" in output


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    """In the batch scripts and in common.sh."""
    scripts = ["scripts/slurm/train.sbatch", "scripts/slurm/sweep.sbatch", "scripts/slurm/common.sh", "run_train.sh"]
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout
