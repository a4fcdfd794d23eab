"""run_train.sh in a copy of the repository's skeleton, with stand-ins for Python.

A stand-in writes down how it was called and ends as the test says, so that what is tested is the script: which command
it runs, with which environment, and what becomes of its exit status.
"""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from shell_repository import ROOT, Repository


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """The skeleton, with an environment in .venv whose Python is the recorder."""
    repository = Repository(tmp_path)
    repository.add_recorder(repository.folder / ".venv/bin/python")
    return repository


def train_arguments(call: dict) -> list[str]:
    """What came after `-m titan_cpt train`."""
    arguments = call["arguments"]
    at = next(i for i in range(len(arguments)) if arguments[i : i + 3] == ["-m", "titan_cpt", "train"])
    return arguments[at + 3 :]


def option(call: dict, name: str) -> str | None:
    """The value of one of torchrun's options, or None if it was not given."""
    return next((a.partition("=")[2] for a in call["arguments"] if a.partition("=")[0] == name), None)


class TestOneProcess:
    """run_train.sh as a newcomer uses it."""

    def test_without_arguments_it_is_the_quick_start(self, repository: Repository) -> None:
        """The quick start's config is found beside the script, and the run stays in the caller's directory."""
        done = repository.run("run_train.sh")

        assert done.returncode == 0, done.stderr
        call = repository.only_call()
        assert call["arguments"][:3] == ["-m", "titan_cpt", "train"]
        assert train_arguments(call) == ["--config", f"{repository.folder}/train_configs/quickstart.toml"]
        assert call["directory"] == str(repository.elsewhere)

    @pytest.mark.parametrize(
        "given", [["--config", "my config.toml", "--training.seq_len", "512"], ["--config=x.toml"]], ids=["two", "one"]
    )
    def test_arguments_with_a_config_pass_through(self, repository: Repository, given: list[str]) -> None:
        """Nothing is added, split or reordered."""
        repository.run("run_train.sh", *given)

        assert train_arguments(repository.only_call()) == given

    def test_overrides_alone_change_the_quick_start(self, repository: Repository) -> None:
        """Without --config, the overrides apply to the quick start's."""
        repository.run("run_train.sh", "--job.name", "--config-like", "--training.seq_len=64")

        assert train_arguments(repository.only_call()) == [
            "--config",
            f"{repository.folder}/train_configs/quickstart.toml",
            "--job.name",
            "--config-like",
            "--training.seq_len=64",
        ]

    @pytest.mark.parametrize("status", [0, 1, 2, 75])
    def test_the_exit_status_is_the_programs(self, repository: Repository, status: int) -> None:
        """What other programs rely on arrives unchanged."""
        assert repository.run("run_train.sh", ACTION=f"exit {status}").returncode == status

    def test_the_command_is_printed_as_it_could_be_typed(self, repository: Repository) -> None:
        """One line on stderr; stdout belongs to the program."""
        done = repository.run("run_train.sh", "--config", "my config.toml", ACTION="echo from the program")

        assert done.stdout == "from the program\n"
        (line,) = done.stderr.splitlines()
        assert line.startswith("+ ")
        assert line.endswith(r"-m titan_cpt train --config my\ config.toml")

    def test_the_program_takes_the_scripts_place(self, repository: Repository) -> None:
        """A signal to the script's process reaches the program itself."""
        process = subprocess.Popen(
            [str(repository.folder / "run_train.sh")],
            cwd=repository.elsewhere,
            env={**repository.environment, "ACTION": "trap 'exit 75' TERM; echo $$; while :; do sleep 0.02; done"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == str(process.pid)
            process.send_signal(signal.SIGTERM)

            assert process.wait(timeout=30) == 75

    def test_a_number_of_processes_must_be_one(self, repository: Repository) -> None:
        """NPROC that is no whole number from 1 is refused before anything is started."""
        done = repository.run("run_train.sh", NPROC="0")

        assert done.returncode == 2
        assert "NPROC must be a whole number from 1, got '0'" in done.stderr
        assert repository.calls() == []


class TestEnvironment:
    """Which Python run_train.sh runs."""

    @pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
    def test_the_active_environment_comes_first(self, repository: Repository, tmp_path: Path, variable: str) -> None:
        """An active environment with titan_cpt is used although .venv is there too."""
        repository.add_recorder(tmp_path / "active/bin/python")

        repository.run("run_train.sh", **{variable: str(tmp_path / "active")})

        assert repository.only_call()["program"] == str(tmp_path / "active/bin/python")

    def test_an_active_environment_without_titan_cpt_is_passed_over(
        self, repository: Repository, tmp_path: Path
    ) -> None:
        """conda's base, active in every shell of many machines, does not hide what setup.sh made."""
        repository.add_recorder(tmp_path / "base/bin/python")

        repository.run("run_train.sh", CONDA_PREFIX=str(tmp_path / "base"), LACKS_TITAN_CPT="base")

        assert repository.only_call()["program"] == f"{repository.folder}/.venv/bin/python"

    def test_without_titan_cpt_it_says_what_to_run(self, repository: Repository) -> None:
        """The environments that were looked at, and the command that mends it."""
        done = repository.run("run_train.sh", LACKS_TITAN_CPT=".venv")

        assert done.returncode == 2
        assert f"not installed in {repository.folder}/.venv" in done.stderr
        assert f"{repository.folder}/scripts/setup.sh" in done.stderr
        assert repository.calls() == []

    def test_without_any_environment_it_says_what_to_run(self, repository: Repository) -> None:
        """A fresh clone."""
        shutil.rmtree(repository.folder / ".venv")

        done = repository.run("run_train.sh")

        assert done.returncode == 2
        assert "no Python environment" in done.stderr
        assert f"{repository.folder}/scripts/setup.sh" in done.stderr


class TestSeveralProcesses:
    """run_train.sh under torchrun."""

    def test_one_node_runs_torchrun_alone(self, repository: Repository) -> None:
        """NPROC processes, no address to agree on, rank 0 shown and the others kept in files."""
        done = repository.run("run_train.sh", "--config", "x.toml", NPROC="3", OMP_NUM_THREADS="5")

        assert done.returncode == 0, done.stderr
        call = repository.only_call()
        assert call["arguments"][:2] == ["-m", "titan_cpt.commands.launch"]
        assert "--standalone" in call["arguments"]
        assert option(call, "--nnodes") == "1"
        assert option(call, "--nproc-per-node") == "3"
        assert option(call, "--local-ranks-filter") == "0"
        assert option(call, "--redirects") == "1:3,2:3"
        assert train_arguments(call) == ["--config", "x.toml"]
        assert call["OMP_NUM_THREADS"] == "5"

    def test_threads_share_the_cores(self, repository: Repository) -> None:
        """More processes than cores leave one thread each; the default is the cores over the processes."""
        repository.add_tool(repository.tools / "nproc", "#!/usr/bin/env bash\necho 13\n")

        repository.run("run_train.sh", NPROC="4")
        repository.run("run_train.sh", NPROC="64")

        assert [call["OMP_NUM_THREADS"] for call in repository.calls()] == ["3", "1"]

    def test_log_rank_chooses_what_is_shown(self, repository: Repository) -> None:
        """LOG_RANK passes through, and only the others are redirected."""
        repository.run("run_train.sh", NPROC="4", LOG_RANK="1,3")

        call = repository.only_call()
        assert option(call, "--local-ranks-filter") == "1,3"
        assert option(call, "--redirects") == "0:3,2:3"

    def test_nodes_meet_at_the_address_given(self, repository: Repository) -> None:
        """MASTER_ADDR, MASTER_PORT and NODE_RANK reach torchrun; one process on each of two nodes needs it too."""
        repository.run("run_train.sh", NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.7", MASTER_PORT="1234")

        call = repository.only_call()
        assert option(call, "--nnodes") == "2"
        assert option(call, "--nproc-per-node") == "1"
        assert option(call, "--node-rank") == "1"
        assert option(call, "--master-addr") == "10.0.0.7"
        assert option(call, "--master-port") == "1234"
        assert "--standalone" not in call["arguments"]

    def test_slurm_tells_the_nodes(self, repository: Repository) -> None:
        """Number, rank, the first node's name and a port of the job's own come from Slurm's variables."""
        repository.add_tool(
            repository.tools / "scontrol",
            '#!/usr/bin/env bash\n[[ "$*" == "show hostnames gpu[07-08,12]" ]] && printf "gpu07\\ngpu08\\ngpu12\\n"\n',
        )

        done = repository.run(
            "run_train.sh",
            NPROC="8",
            SLURM_JOB_NUM_NODES="3",
            SLURM_NODEID="2",
            SLURM_JOB_NODELIST="gpu[07-08,12]",
            SLURM_JOB_ID="123456",
        )

        assert done.returncode == 0, done.stderr
        call = repository.only_call()
        assert option(call, "--nnodes") == "3"
        assert option(call, "--node-rank") == "2"
        assert option(call, "--master-addr") == "gpu07"
        assert option(call, "--master-port") == "23456"

    @pytest.mark.parametrize(
        ("environment", "message"),
        [
            ({"NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK must be this node's rank, from 0 to 1"),
            ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"}, "from 0 to 1 with NNODES=2; got '2'"),
            ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR must name node 0"),
            ({"SLURM_LOCALID": "1"}, "srun --ntasks-per-node=1"),
        ],
        ids=["no rank", "rank too high", "no address", "two wrappers on a node"],
    )
    def test_what_cannot_work_is_refused(
        self, repository: Repository, environment: dict[str, str], message: str
    ) -> None:
        """Exit status 2 and what to set, instead of a rendezvous that waits for ever."""
        done = repository.run("run_train.sh", **environment)

        assert done.returncode == 2
        assert message in done.stderr
        assert repository.calls() == []

    @pytest.mark.parametrize("status", [2, 75])
    def test_the_programs_status_wins_over_torchruns(self, repository: Repository, status: int) -> None:
        """torchrun ends with 1 whatever happened; the program wrote down what it was."""
        done = repository.run(
            "run_train.sh", NPROC="2", ACTION=f'echo {status} > "$TITAN_CPT_STATUS_FILE"; echo why >&2; exit 1'
        )

        assert done.returncode == status
        assert done.stderr.splitlines()[1:] == ["why"]

    @pytest.mark.parametrize("written", ["", "0", "nonsense"], ids=["nothing", "success", "no number"])
    def test_a_failure_never_becomes_a_success(self, repository: Repository, written: str) -> None:
        """A failure of torchrun without a usable status is 1, and its files are removed."""
        done = repository.run(
            "run_train.sh", NPROC="2", ACTION=f'printf "%s" "{written}" > "$TITAN_CPT_STATUS_FILE"; exit 1'
        )

        assert done.returncode == 1
        assert list((repository.folder.parent / "tmp").iterdir()) == []

    def test_success_is_success_whatever_was_written(self, repository: Repository) -> None:
        """A status left by an earlier attempt does not spoil a run that torchrun ended well."""
        action = 'echo 1 > "$TITAN_CPT_STATUS_FILE"; exit 0'

        assert repository.run("run_train.sh", NPROC="2", ACTION=action).returncode == 0

    @pytest.mark.parametrize(("status", "shown"), [(1, 1), (2, 1), (75, 0)])
    def test_errors_of_hidden_processes_are_shown_after_a_failure(
        self, repository: Repository, status: int, shown: int
    ) -> None:
        """Where only processes that are not shown know the reason, it is shown in the end, once if they agree."""
        action = f"""
            for rank in 1 2; do
                logs=$(dirname "$TITAN_CPT_STATUS_FILE")/logs/none_x/attempt_0/$rank
                mkdir -p "$logs"; echo "DataError: pile.bin is cut short" > "$logs/stderr.log"
            done
            echo {status} > "$TITAN_CPT_STATUS_FILE"; exit 1"""

        done = repository.run("run_train.sh", NPROC="3", ACTION=action)

        assert done.returncode == status
        assert done.stderr.count("process 1 of this node") == shown
        assert done.stderr.count("DataError: pile.bin is cut short") == shown

    @pytest.mark.parametrize(
        ("said_by", "shown"),
        [
            ({0: "PlanError: x", 1: "PlanError: x", 2: ""}, []),
            ({0: "PlanError: x", 1: "DataError: y", 2: "DataError: y"}, ["DataError: y"]),
            ({0: "PlanError: x", 1: "PlanError: x"}, []),  # process 2 fell to a traceback when the others left
            ({}, ["Traceback 1", "Traceback 2"]),
        ],
        ids=["all alike", "one of its own", "one cut off", "no message"],
    )
    def test_one_message_is_shown_once_after_the_users_mistake(
        self, repository: Repository, said_by: dict[int, str], shown: list[str]
    ) -> None:
        """What the shown process said is not repeated, and what follows from it is not shown."""
        action = "".join(f'echo "{text}" > "$TITAN_CPT_STATUS_FILE.process-{rank}";' for rank, text in said_by.items())
        action = action.replace('echo ""', "printf ''")
        action += """
            for rank in 1 2; do
                logs=$(dirname "$TITAN_CPT_STATUS_FILE")/none_x/attempt_0/$rank
                mkdir -p "$logs"; echo "Traceback $rank" > "$logs/stderr.log"
            done
            echo 2 > "$TITAN_CPT_STATUS_FILE"; exit 1"""

        done = repository.run("run_train.sh", NPROC="3", ACTION=action)

        assert done.returncode == 2
        messages = [line for line in done.stderr.splitlines()[1:] if not line.startswith("run_train.sh: last output")]
        assert messages == shown

    def test_on_several_nodes_a_mistake_in_the_config_is_left_to_the_launcher(self, repository: Repository) -> None:
        """It tells the mistake once for all nodes; here each node would."""
        done = repository.run(
            "run_train.sh", NNODES="2", NODE_RANK="1", MASTER_ADDR="a", MASTER_PORT="1", RUN_INFO_STATUS="2"
        )

        assert option(repository.only_call(), "--node") == "1/2@a:1"
        assert done.returncode == 0

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_is_passed_on_and_waited_for(self, repository: Repository, number: signal.Signals) -> None:
        """torchrun hears the signal, has the time to save, and the status that the program wrote comes out."""
        name = number.name.removeprefix("SIG")
        action = f"""
            trap 'sleep 0.3; echo saved; echo 75 > "$TITAN_CPT_STATUS_FILE"; exit 1' {name}
            echo ready; while :; do sleep 0.02; done"""
        process = subprocess.Popen(
            [str(repository.folder / "run_train.sh")],
            cwd=repository.elsewhere,
            env={**repository.environment, "NPROC": "2", "ACTION": action},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
            rest = process.stdout.read()

            assert (process.wait(timeout=30), rest) == (75, "saved\n")
        assert int(repository.only_call()["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) >= 600


class TestLogsAndRestarts:
    """What run_train.sh keeps of a node, and what a cluster asks of it."""

    def test_logs_are_kept_in_the_runs_folder_and_nothing_elsewhere(self, repository: Repository) -> None:
        """console.txt has both streams, files that hold nothing are removed, and TMPDIR stays empty."""
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
        """The job's number, the array's task and how often Slurm started it; one process keeps its output there."""
        slurm = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "2", "SLURM_NODEID": "0"}
        for restarts in ({}, {"SLURM_RESTART_COUNT": "3"}):
            done = repository.run("run_train.sh", ACTION="echo loss; exit 0", **slurm, **restarts)

            assert (done.returncode, done.stdout) == (0, "loss\n"), done.stderr
        logs = repository.elsewhere / "outputs/run/logs"
        assert sorted(path.name for path in logs.iterdir()) == ["slurm-10_2-start-0", "slurm-10_2-start-3"]
        assert [path.read_text().splitlines()[-1] for path in logs.rglob("console.txt")] == ["loss", "loss"]

    @pytest.mark.skipif(not shutil.which("script"), reason="script(1), which makes a terminal, is not installed")
    def test_nothing_is_left_of_a_run_on_a_terminal_that_hides_no_process(self, repository: Repository) -> None:
        """The terminal had it all: no folder logs/ stays behind."""
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

    def test_a_folder_that_cannot_be_written_leaves_the_message_to_the_program(self, repository: Repository) -> None:
        """The logs go into TMPDIR, from where they are removed at the end, and the program is started."""
        (repository.elsewhere / "outputs").write_text("a file")

        done = repository.run("run_train.sh", NPROC="2", ACTION="echo cannot be written; exit 1")

        assert done.returncode == 1
        assert "cannot be written" in done.stdout
        assert list((repository.folder.parent / "tmp").iterdir()) == []

    def test_a_mistake_in_the_config_starts_no_process(self, repository: Repository) -> None:
        """The config is checked once, before torchrun, with the program's status."""
        done = repository.run("run_train.sh", NPROC="2", RUN_INFO_STATUS="2")

        assert done.returncode == 2
        assert repository.calls() == []
        assert not (repository.elsewhere / "outputs").exists()

    def test_max_restarts_on_one_node(self, repository: Repository) -> None:
        """torchrun starts all of its processes again so often."""
        repository.run("run_train.sh", NPROC="2", MAX_RESTARTS="3")

        call = repository.only_call()
        assert option(call, "--max-restarts") == "3"
        assert "--standalone" in call["arguments"]

    @pytest.mark.parametrize("node", ["0", "1"])
    def test_max_restarts_on_several_nodes(self, repository: Repository, node: str) -> None:
        """The nodes start again together: torchrun's c10d rendezvous at node 0, with the config's timeout."""
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

    def test_without_restarts_several_nodes_wait_as_long_as_the_config_says(self, repository: Repository) -> None:
        """comm.init_timeout_seconds is torchrun's timeout too."""
        repository.run("run_train.sh", NNODES="2", NODE_RANK="1", MASTER_ADDR="gpu07", MASTER_PORT="1234")

        call = repository.only_call()
        assert "--rdzv-conf=timeout=345" in call["arguments"]
        assert option(call, "--max-restarts") is None

    def test_a_number_of_restarts_must_be_one(self, repository: Repository) -> None:
        """MAX_RESTARTS that is no whole number is refused before anything is started."""
        done = repository.run("run_train.sh", NPROC="2", MAX_RESTARTS="-1")

        assert done.returncode == 2
        assert "MAX_RESTARTS must be a whole number from 0, got '-1'" in done.stderr
        assert repository.calls() == []

    def test_a_process_for_each_gpu_of_this_node(self, repository: Repository) -> None:
        """Slurm's count comes first, which differs between the nodes of a job; else those that nvidia-smi lists."""
        listing = "#!/usr/bin/env bash\nprintf 'GPU 0: A (UUID: a)\\nGPU 1: A (UUID: b)\\n  MIG 1g\\n'\n"
        repository.add_tool(repository.tools / "nvidia-smi", listing)

        repository.run("run_train.sh", NPROC="gpu", SLURM_GPUS_ON_NODE="5")
        repository.run("run_train.sh", NPROC="gpu")

        assert [option(call, "--nproc-per-node") for call in repository.calls()] == ["5", "2"]

    def test_a_node_without_gpus_runs_one_process_and_says_so(self, repository: Repository) -> None:
        """NPROC=gpu on a CPU cluster."""
        done = repository.run("run_train.sh", NPROC="gpu")

        assert done.returncode == 0
        assert "this node has no GPU: training with one process" in done.stderr
        assert repository.only_call()["arguments"][:3] == ["-m", "titan_cpt", "train"]

    def test_slurms_usr1_asks_torchrun_to_stop(self, repository: Repository) -> None:
        """SIGUSR1 would kill torchrun: it is passed on as SIGTERM."""
        action = """
            trap 'echo 75 > "$TITAN_CPT_STATUS_FILE"; exit 1' TERM
            echo ready; while :; do sleep 0.02; done"""

        assert self.signalled(repository, action, signal.SIGUSR1) == 75

    def test_processes_that_still_save_when_torchrun_has_left_are_waited_for(self, repository: Repository) -> None:
        """A second signal makes torchrun leave at once; its processes save, and their status counts."""
        action = """
            setsid bash -c 'sleep 1.5; echo 75 > "$TITAN_CPT_STATUS_FILE"' &
            trap 'exit 1' TERM
            echo ready; while :; do sleep 0.02; done"""

        assert self.signalled(repository, action, signal.SIGTERM) == 75

    @staticmethod
    def signalled(repository: Repository, action: str, number: signal.Signals) -> int:
        """The exit status of a run of two processes that is sent a signal once it is ready."""
        process = subprocess.Popen(
            [str(repository.folder / "run_train.sh")],
            cwd=repository.elsewhere,
            env={**repository.environment, "NPROC": "2", "ACTION": action},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
            return process.wait(timeout=30)


@pytest.mark.parametrize("script", ["run_train.sh", "scripts/setup.sh", ".ci/run"])
def test_scripts_are_executable_and_strict(script: str) -> None:
    """A clone can run them, they stop at the first failure, and they parse."""
    path = ROOT / script

    assert os.access(path, os.X_OK)
    assert "set -euo pipefail" in path.read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
