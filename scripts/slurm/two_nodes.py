"""Start a real Slurm with two node daemons on this host; all its files are in one folder.

Needs slurmctld, slurmd and munged on PATH (Debian: apt-get install slurm-wlm munge) and root, as slurmd does. Nothing
outside the folder is changed, except that proctrack/cgroup makes groups named slurm in the system's cgroups.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("n0", "n1")
_FIRST_PORT = 16817
CONFIG = """\
ClusterName=trial
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=30
SlurmdTimeout=20
JobRequeue=1
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmctldPort={control_port}
FirstJobId={first_job}
PreemptMode=REQUEUE
PreemptType=preempt/partition_prio
GresTypes=gpu
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_0} CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_1} CPUs=4 RealMemory=4000 Gres=gpu:1 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=nograce Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class TwoNodes:
    """slurmctld and two slurmd, started in `folder` and stopped at the end of the `with` block.

    Args:
        tracking: Slurm's ProctrackType: "linuxproc", or "cgroup" as on production clusters, needing writable cgroups.
    """

    def __init__(self, folder: Path, tracking: str = "linuxproc") -> None:
        self.folder = folder
        self.tracking = tracking
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def __enter__(self) -> TwoNodes:
        """Start the daemons and wait until both nodes are idle."""
        for part in ("munge", "state", "log", *(f"spool/{node}" for node in NODES)):
            (self.folder / part).mkdir(parents=True)
        base = _free_ports(3)
        self._write_config(base)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        files = [f"--{option}={self.folder / 'munge' / name}" for option, name in names.items()]
        try:
            self.start("munged", "munged", "--force", "--foreground", *files)
            wait_for(lambda: (self.folder / "munge" / "socket").exists(), 20, "munged's socket")
            self.start("slurmctld", "slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
            for node in NODES:
                self.start_node(node)
            wait_for(
                lambda: self.command("sinfo", "-h", "-p", "high", "-t", "idle", "-o", "%D") == "2", 60, "two nodes"
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def _write_config(self, base: int) -> None:
        text = CONFIG.format(
            folder=self.folder,
            host=socket.gethostname(),
            user=self.command("id", "-un"),
            tracking=self.tracking,
            control_port=base,
            first_job=1
            + 100 * (base - _FIRST_PORT),  # two such Slurms have different job ids, and so different torchrun ports
            port_0=base + 1,
            port_1=base + 2,
        )
        (self.folder / "slurm.conf").write_text(text)
        # Two GPUs on one node and one on the other that exist for Slurm only.
        devices = (("n0", "/dev/null"), ("n0", "/dev/zero"), ("n1", "/dev/null"))
        gres = "".join(f"NodeName={node} Name=gpu File={device}\n" for node, device in devices)
        (self.folder / "gres.conf").write_text(gres)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")

    def __exit__(self, *_: object) -> None:
        """End all jobs and daemons."""
        if "slurmctld" in self.daemons:
            self.end_jobs()
        for name in reversed(list(self.daemons)):
            self.stop(name, signal.SIGTERM)

    def start(self, name: str, *command: str) -> None:
        """Start a daemon as a child process in a new session; its output goes to log/NAME.console."""
        log = (self.folder / "log" / f"{name}.console").open("ab")
        self.daemons[name] = subprocess.Popen(
            command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self.start(node, "slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf"))

    def stop(self, name: str, number: signal.Signals) -> None:
        """Send a daemon a signal and wait for its end."""
        process = self.daemons.pop(name)
        process.send_signal(number)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def kill_node(self, node: str) -> None:
        """Simulate a power cut: send SIGKILL to the node's daemon and to every process of its jobs."""
        pids = [each for stepd in self.stepds(node) for each in (stepd, *descendants(stepd))]
        self.stop(node, signal.SIGKILL)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stepds(self, node: str) -> list[int]:
        """Process ids of the slurmstepd processes of a node, one for each job step."""
        found = []
        for line in self.command("ps", "-eo", "pid=,args=").splitlines():
            pid, _, words = line.strip().partition(" ")
            if words.strip().startswith("slurmstepd: [") and self._node_of(int(pid)) == node:
                found.append(int(pid))
        return found

    def _node_of(self, stepd: int) -> str:
        """The node of a slurmstepd, from the environment of its child processes; "" if this Slurm did not start it."""
        for pid in descendants(stepd):
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if f"SLURM_CONF={self.folder / 'slurm.conf'}".encode() not in words:
                continue  # of another Slurm on this host
            for word in words:
                if word.startswith(b"SLURMD_NODENAME="):
                    return word.decode().partition("=")[2]
        return ""

    def end_jobs(self) -> None:
        """Cancel all jobs and wait up to 60 s until the queue is empty."""
        self.command("scancel", "--full", "--user", self.command("id", "-un"), check=False)
        deadline = time.monotonic() + 60
        while self.command("squeue", "-h", check=False) and time.monotonic() < deadline:
            time.sleep(0.5)

    def command(self, *words: str, check: bool = True, cwd: Path | None = None, **environment: str) -> str:
        """Run a command with this Slurm's environment; returns its stdout."""
        done = subprocess.run(
            words, env={**self.environment, **environment}, cwd=cwd, capture_output=True, text=True, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def job(self, job: str, field: str) -> str:
        """A field of `scontrol show job`, such as JobState, Restarts or ExitCode."""
        shown = self.command("scontrol", "-o", "show", "job", job, check=False)
        match = re.search(rf"(?:^|\s){field}=(\S+)", shown)
        return match[1] if match else ""


def _free_ports(count: int) -> int:
    """The first of `count` consecutive free ports."""
    for base in range(_FIRST_PORT, 30000, count):
        try:
            for port in range(base, base + count):
                with socket.socket() as trial:
                    trial.bind(("", port))
        except OSError:
            continue
        return base
    raise RuntimeError("no free ports")


def descendants(pid: int) -> list[int]:
    """Process ids of all descendants of a process."""
    try:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [each for child in children for each in (child, *descendants(child))]


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until the condition is true; `what` names it in the error.

    Raises:
        TimeoutError: the condition is still false after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.3)
