"""titan_cpt.commands.launch: checks before processes start, nodes that meet, one message instead of torchrun's log."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import faulty
import pytest
import torch
import torch.distributed as dist
import training

from titan_cpt.commands import launch
from titan_cpt.commands.launch import LaunchError, Node, meet
from titan_cpt.distributed import process_group
from titan_cpt.errors import PlanError

pytestmark = [
    *training.THEIR_WARNINGS_IGNORED,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo"),
]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def port():
    """A free port."""
    return faulty.free_port()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config of several thousand steps with a global batch of 4 sequences and a local batch of 2."""
    folder = tmp_path_factory.mktemp("launch")
    raw = training.two_stages(training.write_languages(folder), folder)
    raw["stages"][0]["steps"] = 5000
    return training.write_config(training.changed(raw, checkpoint={"interval": 1000}), folder / "c.toml")


def meet_as(nodes, port, **problems):
    """Run `meet` in one thread per node; returns its (message, status) for each node, or None where it succeeded."""
    ends = {}
    stores = []

    def one(rank):
        try:
            stores.append(meet(Node(rank, nodes, "127.0.0.1", port), problems.get(f"node{rank}", ""), 20))
            ends[rank] = None
        except LaunchError as error:
            ends[rank] = (str(error), error.status)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(nodes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [ends[rank] for rank in range(nodes)]


def test_nodes_without_an_error_meet(port):
    """Three nodes."""
    assert meet_as(3, port) == [None, None, None]


def test_an_error_that_every_node_finds_is_printed_by_node_0_only(port):
    """Every node exits with 2."""
    said = {f"node{rank}": "PlanError: 8 into 3" for rank in range(3)}

    assert meet_as(3, port, **said) == [("PlanError: 8 into 3", 2), ("", 2), ("", 2)]


def test_an_error_of_one_node_stops_all_and_names_that_node(port):
    """A config is missing on node 2 only: node 0 prints it, because users look at the output of node 0."""
    ends = meet_as(3, port, node2="ConfigError: no file")

    assert ends == [(f"node 2 ({socket.gethostname()}): ConfigError: no file", 2), ("", 2), ("", 2)]


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            0,
            "1 of 2 nodes have joined at 127.0.0.1:{port} after 1 s; missing: node 1. Check that run_train.sh",
        ),
        (1, "node 1 has waited 1 s for node 0 at 127.0.0.1:{port}: [Errno 111] Connection refused. Check that"),
    ],
)
def test_a_waiting_node_prints_which_nodes_are_missing_and_what_to_check(port, node, message, monkeypatch, capsys):
    """At intervals; in the end with status 1, because it may not be the user's mistake."""
    monkeypatch.setattr(launch, "_SECONDS_BETWEEN_REMINDERS", 0.5)
    with pytest.raises(LaunchError) as error:
        meet(Node(node, 2, "127.0.0.1", port), "", 1.2)

    assert message.format(port=port) in capsys.readouterr().err
    assert error.value.status == 1


def test_a_node_with_an_error_does_not_wait_long_for_the_others(port, monkeypatch):
    """Node 0 never joins."""
    monkeypatch.setattr(launch, "_SECONDS_TO_SHARE_AN_ERROR", 0.2)
    with pytest.raises(LaunchError, match="PlanError: mine"):
        meet(Node(1, 2, "127.0.0.1", port), "PlanError: mine", 60)


def test_a_port_in_use_is_an_error_that_says_what_to_do():
    """Status 2, and not 46 lines of torch that end with `[Errno 98]`."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            LaunchError, match=rf"port {port} of .* is in use .*Set MASTER_PORT to a free port"
        ) as error:
            meet(Node(0, 2, "127.0.0.1", port), "", 5)

    assert error.value.status == 2


def test_an_unknown_address_is_an_error_at_once(port):
    """No node waits for it."""
    with pytest.raises(LaunchError, match=r"MASTER_ADDR 'no such host' is not known on"):
        meet(Node(1, 2, "no such host", port), "", 5)


@pytest.fixture
def two_gpus(monkeypatch):
    """torch finds two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_without_a_gpu_any_number_of_processes_trains_on_the_cpu(monkeypatch):
    """As on a laptop."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    process_group.require_gpus(4)


def test_more_processes_than_gpus_are_refused_before_any_starts(two_gpus, config, monkeypatch, capsys):
    """What run_train.sh runs prints one sentence, exits with 2 and does not start torchrun."""
    monkeypatch.setattr(launch, "torchrun", lambda words: pytest.fail("torchrun was started"))
    words = ["-m", "titan_cpt", "train", "--config", str(config)]
    assert launch.find_problem(["--standalone", "--nproc-per-node=2", *words], nodes=1) == ""
    with pytest.raises(SystemExit) as end:
        launch.main(["--standalone", "--nproc-per-node=4", *words])

    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"PlanError: 4 processes on {socket.gethostname()}, which has 2 GPUs for them: ")
    assert "Start with NPROC=2" in line


@pytest.mark.parametrize("local_rank", ["0", "3"])
def test_more_processes_than_gpus_are_refused_on_every_rank_under_torchrun(two_gpus, monkeypatch, local_rank):
    """Also on the ranks that have a GPU: they would wait for the others."""
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: pytest.fail("a rank waits"))
    for name, value in {
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "4",
        "RANK": local_rank,
        "LOCAL_RANK": local_rank,
    }.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(PlanError, match=r"^4 processes on .* 2 GPUs for them: .*--nproc-per-node=2"):
        process_group.init_process_group()


def test_a_local_rank_without_a_gpu_is_refused_under_a_launcher_that_tells_no_count(two_gpus, monkeypatch):
    """And not "CUDA error: invalid device ordinal"."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "3")

    with pytest.raises(PlanError, match=r"^4 processes on .* 2 GPUs for them"):
        process_group.init_process_group()


def test_a_gpu_in_use_is_a_plan_error(two_gpus, monkeypatch):
    """The first line of torch's message, and where to look."""

    def set_device(device):
        raise RuntimeError("CUDA error: CUDA-capable device(s) is busy\nCUDA kernel errors might ...")

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(PlanError, match=r"GPU 1 cannot be used: CUDA error: .* busy\. `nvidia-smi`"):
        process_group.init_process_group()


def test_a_port_in_use_is_a_plan_error_under_another_launcher(monkeypatch):
    """torchrun itself, with --master-port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(PlanError, match=rf"port {port} of .* is in use"):
            process_group.init_process_group(5)


def test_a_plan_error_is_one_message_under_several_processes(config, tmp_path):
    """A batch of 4 is not divisible by 3 x 2; the message is not repeated per process, and torchrun prints no log."""
    environment = {**os.environ, "NPROC": "3", "VIRTUAL_ENV": sys.prefix}
    done = subprocess.run(
        [str(ROOT / "run_train.sh"), "--config", str(config), "--job.output_dir", str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    command, *message = done.stderr.splitlines()

    assert done.returncode == 2
    assert command.startswith("+ ")
    assert message[0] == "PlanError: 1 problem in the plan of 'run':"
    assert message[1].startswith("  - training.global_batch_size: ")
    assert len(message) == 2
    assert done.stdout == ""


def test_a_stop_on_a_signal_shows_no_traceback(config, tmp_path):
    """torchrun raises SignalException on SIGTERM; the ranks save and exit with 75."""
    run, status = tmp_path / "run", tmp_path / "status"
    command = [
        sys.executable,
        "-m",
        "titan_cpt.commands.launch",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "titan_cpt",
        "train",
    ]
    process = subprocess.Popen(
        [*command, "--config", str(config), "--job.output_dir", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TITAN_CPT_STATUS_FILE": str(status)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 120
    while not training.lines_of(run, "train"):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)

    assert process.returncode == 128 + signal.SIGTERM
    assert status.read_text() == "75"
    assert "stopped by SIGTERM; everything is saved" in output
    assert errors == ""


def test_a_killed_process_is_named(tmp_path):
    """One line with its number, host and signal."""
    (tmp_path / "child.py").write_text(
        "import os, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\ntime.sleep(60)"
    )
    code = "import sys; from titan_cpt.commands.launch import _run; sys.exit(_run(sys.argv[1:]))"
    options = ["--standalone", "--nproc-per-node=2", str(tmp_path / "child.py")]
    done = subprocess.run(
        [sys.executable, "-c", code, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"process 1 of {socket.gethostname()} (pid ")
    assert line.endswith("was killed by SIGKILL, often because host memory ran out")


@dataclass(frozen=True)
class Elsewhere:
    """One rank's working directory is a folder in which relative paths do not exist, as on a node without the files."""

    rank: int
    data: Path

    def lay(self):
        """Every other rank works in the folder that has the data."""
        os.chdir("/" if os.environ["RANK"] == str(self.rank) else self.data)


@pytest.mark.parametrize("rank", [0, 1])
def test_files_missing_on_one_node_stop_every_rank_with_one_message(tmp_path, rank):
    """No rank waits in a collective for the rank that has left."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw["datasets"]["en"]["train"] = "en"
    config = training.write_config(raw, tmp_path / "c.toml")
    outcomes = faulty.launch(config, faults=[Elsewhere(rank, tmp_path)], ranks=2)

    assert [outcome.status for outcome in outcomes] == [2, 2], outcomes[0].output + outcomes[1].output
    assert ("rank 1: " in outcomes[0].output) == (rank == 1)
    assert "en: no .bin/.idx pair of that name" in outcomes[0].output
    assert outcomes[1].output == ""


def test_an_error_that_only_rank_0_finds_stops_every_rank(tmp_path):
    """The run folder cannot be created; only rank 0 takes its lock."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path / "file")
    (tmp_path / "file").write_text("")
    outcomes = faulty.launch(training.write_config(raw, tmp_path / "c.toml"), ranks=2)

    assert [outcome.status for outcome in outcomes] == [2, 2]
    assert f"CheckpointError: {tmp_path / 'file' / 'run'}: cannot be written" in outcomes[0].output
    assert outcomes[1].output == ""
