"""run_train.sh with stand-ins for Python: logs of a node, restarts, GPU counts and signals on a cluster."""

import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from shell_repository import Repository, option, signalled


class TestLogsAndRestarts:
    """Logs of a node, restarts, GPU counts and signals on a cluster."""

    def test_logs_are_written_to_the_run_folder_only(self, repository: Repository) -> None:
        """console.txt has both streams, empty files are removed, and TMPDIR stays empty."""
        action = """
            logs=$(dirname "$TITAN_CPT_STATUS_FILE")/none_x/attempt_0
            mkdir -p $logs/1 $logs/2; touch $logs/1/stdout.log; echo late > $logs/2/stderr.log
            echo loss; echo warning >&2"""

        done = repository.run("run_train.sh", "--config", "x.toml", NPROC="3", ACTION=action, NODE_RANK="7")

        (node,) = (repository.elsewhere / "outputs/run/logs").glob("*/node-7-*")
        files = [str(path.relative_to(node)) for path in sorted(node.rglob("*")) if path.is_file()]
        assert files == ["console.txt", "none_x/attempt_0/2/stderr.log"]
        assert sorted((node / "console.txt").read_text().splitlines()[-2:]) == ["loss", "warning"]
        assert (done.returncode, done.stdout, done.stderr.splitlines()[1:]) == (0, "loss\n", ["warning"])
        assert list((repository.folder.parent / "tmp").iterdir()) == []

    def test_a_job_of_slurm_has_a_folder_for_each_start(self, repository: Repository) -> None:
        """Named by job id, array task and restart count; a single process writes there too."""
        slurm = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "2", "SLURM_NODEID": "0"}
        for restarts in ({}, {"SLURM_RESTART_COUNT": "3"}):
            done = repository.run("run_train.sh", ACTION="echo loss; exit 0", **slurm, **restarts)

            assert (done.returncode, done.stdout) == (0, "loss\n"), done.stderr
        logs = repository.elsewhere / "outputs/run/logs"
        assert sorted(path.name for path in logs.iterdir()) == ["slurm-10_2-start-0", "slurm-10_2-start-3"]
        assert [path.read_text().splitlines()[-1] for path in logs.rglob("console.txt")] == ["loss", "loss"]

    @pytest.mark.skipif(not shutil.which("script"), reason="script(1), which makes a terminal, is not installed")
    def test_a_terminal_that_prints_every_process_leaves_no_logs(self, repository: Repository) -> None:
        """The terminal showed all output: there is no folder logs/ afterwards."""
        command = f"'{repository.folder}/run_train.sh' --config x.toml"
        repository.environment["NPROC"] = "2"
        done = subprocess.run(
            ["script", "--quiet", "--return", "--command", command, "/dev/null"],
            cwd=repository.elsewhere,
            env={**repository.environment, "LOG_RANK": "0,1", "ACTION": "[[ -t 1 ]]"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )

        assert done.returncode == 0, done.stdout
        assert len(repository.calls()) == 1
        assert not list(repository.elsewhere.rglob("logs"))

    def test_titan_cpt_reports_a_run_folder_that_cannot_be_written(self, repository: Repository) -> None:
        """The script starts it anyway; logs go to TMPDIR and are removed at the end."""
        (repository.elsewhere / "outputs").write_text("a file")

        done = repository.run("run_train.sh", NPROC="2", ACTION="echo cannot be written; exit 1")

        assert done.returncode == 1
        assert "cannot be written" in done.stdout
        assert list((repository.folder.parent / "tmp").iterdir()) == []

    def test_a_config_error_starts_no_process(self, repository: Repository) -> None:
        """The config is checked once, before torchrun; the exit status is that of titan_cpt."""
        done = repository.run("run_train.sh", NPROC="2", RUN_INFO_STATUS="2")

        assert done.returncode == 2
        assert repository.calls() == []
        assert not (repository.elsewhere / "outputs").exists()

    def test_max_restarts_on_one_node(self, repository: Repository) -> None:
        """MAX_RESTARTS is passed to torchrun."""
        repository.run("run_train.sh", NPROC="2", MAX_RESTARTS="3")

        call = repository.only_call()
        assert option(call, "--max-restarts") == "3"
        assert "--standalone" in call["arguments"]

    @pytest.mark.parametrize("node", ["0", "1"])
    def test_max_restarts_on_several_nodes(self, repository: Repository, node: str) -> None:
        """The nodes restart together: torchrun's c10d rendezvous at node 0, with the timeout of the config."""
        repository.run(
            "run_train.sh", NNODES="2", NODE_RANK=node, MASTER_ADDR="gpu07", MASTER_PORT="1234", MAX_RESTARTS="1"
        )

        call = repository.only_call()
        assert option(call, "--max-restarts") == "1"
        assert option(call, "--rdzv-backend") == "c10d"
        assert option(call, "--rdzv-endpoint") == "gpu07:1234"
        waits = next(word for word in call["arguments"] if word.startswith("--rdzv-conf="))
        assert waits == f"--rdzv-conf=join_timeout=345,read_timeout=345,is_host={int(node == '0')}"
        assert option(call, "--node-rank") is None

    def test_without_restarts_the_rendezvous_has_the_timeout_of_the_config(self, repository: Repository) -> None:
        """comm.init_timeout_seconds is passed to torchrun."""
        repository.run("run_train.sh", NNODES="2", NODE_RANK="1", MASTER_ADDR="gpu07", MASTER_PORT="1234")

        call = repository.only_call()
        assert "--rdzv-conf=timeout=345" in call["arguments"]
        assert option(call, "--max-restarts") is None

    def test_max_restarts_must_be_an_integer(self, repository: Repository) -> None:
        """Any other MAX_RESTARTS is refused before a process is started."""
        done = repository.run("run_train.sh", NPROC="2", MAX_RESTARTS="-1")

        assert done.returncode == 2
        assert "MAX_RESTARTS must be a whole number from 0, got '-1'" in done.stderr
        assert repository.calls() == []

    @pytest.mark.parametrize(
        ("environment", "processes"),
        [
            ({}, 4),
            ({"SLURM_GPUS_ON_NODE": "3"}, 3),
            ({"CUDA_VISIBLE_DEVICES": "2,0"}, 2),
            ({"CUDA_VISIBLE_DEVICES": "GPU-8f6, GPU-1a2,GPU-77b"}, 3),
            ({"CUDA_VISIBLE_DEVICES": "0,1,-1,2"}, 2),
            ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "3"}, 2),
            ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, 4),
        ],
    )
    def test_nproc_gpu_starts_one_process_per_gpu(
        self, repository: Repository, environment: dict[str, str], processes: int
    ) -> None:
        """Those that Slurm allocated on this node, else those that nvidia-smi lists (four here), and of them those that
        CUDA_VISIBLE_DEVICES lists, up to its first entry that is no device."""
        listing = "#!/usr/bin/env bash\nprintf 'GPU %d: A (UUID: a)\\n  MIG 1g\\n' 0 1 2 3\n"
        repository.add_tool(repository.tools / "nvidia-smi", listing)

        repository.run("run_train.sh", NPROC="gpu", **environment)

        assert option(repository.only_call(), "--nproc-per-node") == str(processes)

    @pytest.mark.parametrize(
        ("visible", "message"),
        [("MIG-7c1,MIG-9e2", ""), ("", "has no GPU"), ("-1", "has no GPU"), ("NoDevFiles", "has no GPU")],
    )
    def test_nproc_gpu_starts_one_process_if_a_process_sees_at_most_one_device(
        self, repository: Repository, visible: str, message: str
    ) -> None:
        """CUDA shows a process one of several MIG devices; without a visible device a note is printed."""
        repository.add_tool(repository.tools / "nvidia-smi", "#!/usr/bin/env bash\necho 'GPU 0: A'; echo 'GPU 1: A'\n")

        done = repository.run("run_train.sh", NPROC="gpu", CUDA_VISIBLE_DEVICES=visible)

        assert repository.only_call()["arguments"][:3] == ["-m", "titan_cpt", "train"]
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1 + bool(message)

    def test_nproc_gpu_without_gpus_starts_one_process_and_prints_a_note(self, repository: Repository) -> None:
        """On a CPU cluster."""
        done = repository.run("run_train.sh", NPROC="gpu")

        assert done.returncode == 0
        assert "this node has no GPU: training with one process" in done.stderr
        assert repository.only_call()["arguments"][:3] == ["-m", "titan_cpt", "train"]

    def test_usr1_of_slurm_is_forwarded_as_term(self, repository: Repository) -> None:
        """SIGUSR1 would kill torchrun."""
        action = """
            trap 'echo 75 > "$TITAN_CPT_STATUS_FILE"; exit 1' TERM
            echo ready; while :; do sleep 0.02; done"""

        assert signalled(repository, action, signal.SIGUSR1)[0] == 75

    def test_the_script_waits_for_processes_that_save_after_torchrun_has_exited(self, repository: Repository) -> None:
        """torchrun exits at once at a second signal; its processes save, and their status counts."""
        action = """
            setsid bash -c 'sleep 1.5; echo 75 > "$TITAN_CPT_STATUS_FILE"' &
            trap 'exit 1' TERM
            echo ready; while :; do sleep 0.02; done"""

        assert signalled(repository, action, signal.SIGTERM)[0] == 75

    def test_runs_of_one_name_in_two_folders_do_not_wait_for_each_other(self, repository: Repository) -> None:
        """The path by which a script finds its own processes is absolute; equal ones made both wait for 15 minutes."""
        done = repository.run("run_train.sh", NPROC="2")

        assert done.returncode == 0
        status_file = Path(repository.only_call()["TITAN_CPT_STATUS_FILE"])
        assert status_file.is_relative_to(repository.elsewhere.resolve())
