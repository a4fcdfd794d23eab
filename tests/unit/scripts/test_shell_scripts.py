"""run_train.sh in a copy of the repository's skeleton, with stand-ins for Python.

A stand-in writes down how it was called and ends as the test says, so that what is tested is the script: which command
it runs, with which environment, and with which exit status it ends.
"""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from shell_repository import ROOT, Repository, option, signalled


def train_arguments(call: dict) -> list[str]:
    """The arguments after `-m titan_cpt train`."""
    arguments = call["arguments"]
    at = next(i for i in range(len(arguments)) if arguments[i : i + 3] == ["-m", "titan_cpt", "train"])
    return arguments[at + 3 :]


class TestOneProcess:
    """run_train.sh with one process."""

    def test_without_arguments_it_is_the_quick_start(self, repository: Repository) -> None:
        """The quick start's config is found beside the script, and the run stays in the caller's directory."""
        done = repository.run("run_train.sh")

        assert done.returncode == 0, done.stderr
        call = repository.only_call()
        assert call["arguments"][:3] == ["-m", "titan_cpt", "train"]
        assert train_arguments(call) == ["--config", f"{repository.folder}/train_configs/quickstart.toml"]
        assert call["directory"] == str(repository.elsewhere)

    @pytest.mark.parametrize(
        "given",
        [
            ["--config", "my config.toml", "--training.seq_len", "512"],
            ["--config=x.toml"],
            ["my config.toml", "--training.seq_len", "512"],
            ["--training.seq_len", "512", "x.toml"],
            ["no ending"],
        ],
        ids=["two", "one", "positional", "last", "no-ending"],
    )
    def test_arguments_with_a_config_pass_through(self, repository: Repository, given: list[str]) -> None:
        """No argument is added, split or reordered."""
        repository.run("run_train.sh", *given)

        assert train_arguments(repository.only_call()) == given

    def test_help_shows_the_environment_and_the_options_of_train(self, repository: Repository) -> None:
        """Its own comment first; nothing is trained."""
        done = repository.run("run_train.sh", "mine.toml", "--help")

        assert done.stdout.splitlines()[0] == "Train a config on one process, on one node or on several nodes."
        assert "\n  NPROC         processes per node" in done.stdout
        assert "set -euo" not in done.stdout
        assert train_arguments(repository.only_call()) == ["--help"]

    def test_a_dry_run_starts_one_process_and_writes_no_logs(self, repository: Repository) -> None:
        """Also with several processes, whose number it passes on."""
        done = repository.run("run_train.sh", "mine.toml", "--dry-run", NPROC="4", ACTION='echo "ranks: $WORLD_SIZE"')

        assert train_arguments(repository.only_call()) == ["mine.toml", "--dry-run"]
        assert done.stdout == "ranks: 4\n"
        assert list(repository.elsewhere.iterdir()) == []

    def test_overrides_without_a_config_change_the_quick_start(self, repository: Repository) -> None:
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
    def test_the_exit_status_is_that_of_titan_cpt(self, repository: Repository, status: int) -> None:
        """Other programs rely on it."""
        assert repository.run("run_train.sh", ACTION=f"exit {status}").returncode == status

    def test_the_command_is_printed_as_a_shell_line(self, repository: Repository) -> None:
        """One line on stderr; stdout belongs to the program."""
        done = repository.run("run_train.sh", "--config", "my config.toml", ACTION="echo from the program")

        assert done.stdout == "from the program\n"
        (line,) = done.stderr.splitlines()
        assert line.startswith("+ ")
        assert line.endswith(r"-m titan_cpt train --config my\ config.toml")

    def test_quiet_is_passed_on_and_prints_no_command(self, repository: Repository) -> None:
        """Nothing is on stderr then."""
        done = repository.run("run_train.sh", "mine.toml", "--quiet")

        assert train_arguments(repository.only_call()) == ["mine.toml", "--quiet"]
        assert done.stderr == ""

    def test_the_training_process_replaces_the_script(self, repository: Repository) -> None:
        """A signal to the script's process id reaches titan_cpt."""
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

    def test_nproc_must_be_a_positive_integer(self, repository: Repository) -> None:
        """Any other NPROC is refused before a process is started."""
        done = repository.run("run_train.sh", NPROC="0")

        assert done.returncode == 2
        assert "NPROC must be a whole number from 1, got '0'" in done.stderr
        assert repository.calls() == []


class TestEnvironment:
    """Which Python run_train.sh runs."""

    @pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
    def test_the_active_environment_comes_first(self, repository: Repository, tmp_path: Path, variable: str) -> None:
        """An active environment that has titan_cpt is preferred to .venv."""
        repository.add_recorder(tmp_path / "active/bin/python")

        repository.run("run_train.sh", **{variable: str(tmp_path / "active")})

        assert repository.only_call()["program"] == str(tmp_path / "active/bin/python")

    def test_an_active_environment_without_titan_cpt_is_skipped(self, repository: Repository, tmp_path: Path) -> None:
        """conda's base, which is active in every shell of many machines, does not hide the .venv of setup.sh."""
        repository.add_recorder(tmp_path / "base/bin/python")

        repository.run("run_train.sh", CONDA_PREFIX=str(tmp_path / "base"), LACKS_TITAN_CPT="base")

        assert repository.only_call()["program"] == f"{repository.folder}/.venv/bin/python"

    @pytest.mark.parametrize("name", ["python", "python3"])
    def test_without_an_environment_the_python_on_path_is_used(self, repository: Repository, name: str) -> None:
        """A container has neither a virtual environment nor conda; an existing .venv comes before it."""
        repository.add_tool(repository.tools / "python", "#!/usr/bin/env bash\nexit 1\n")
        repository.add_recorder(repository.tools / name)
        repository.run("run_train.sh")
        shutil.rmtree(repository.folder / ".venv")
        repository.run("run_train.sh")

        programs = [call["program"] for call in repository.calls()]
        assert programs == [f"{repository.folder}/.venv/bin/python", str(repository.tools / name)]

    def test_without_titan_cpt_it_says_what_was_tried_and_what_to_run(self, repository: Repository) -> None:
        """Every Python that was tried, once, and the command that installs titan_cpt."""
        for name in ("python", "python3"):
            repository.add_tool(repository.tools / name, "#!/usr/bin/env bash\nexit 1\n")

        done = repository.run("run_train.sh", LACKS_TITAN_CPT=".venv", VIRTUAL_ENV=f"{repository.folder}/.venv")

        assert done.returncode == 2
        tried = f"{repository.folder}/.venv/bin/python {repository.tools}/python {repository.tools}/python3"
        assert f"no Python with titan_cpt and torch; tried: {tried}." in done.stderr
        assert f"{repository.folder}/scripts/setup.sh" in done.stderr
        assert repository.calls() == []


class TestSeveralProcesses:
    """run_train.sh under torchrun."""

    def test_one_node_runs_torchrun_standalone(self, repository: Repository) -> None:
        """NPROC processes, no address; rank 0 is printed, and the output of the others goes to files."""
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
        """LOG_RANK is printed; only the output of other ranks is redirected."""
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

    def test_node_count_rank_address_and_port_come_from_slurm(self, repository: Repository) -> None:
        """The address is the name of the first node; the port is computed from the job id."""
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
    def test_invalid_environments_are_refused(
        self, repository: Repository, environment: dict[str, str], message: str
    ) -> None:
        """Exit status 2 and the variable to set, instead of a rendezvous that never ends."""
        done = repository.run("run_train.sh", **environment)

        assert done.returncode == 2
        assert message in done.stderr
        assert repository.calls() == []

    @pytest.mark.parametrize("status", [2, 75])
    def test_the_status_of_titan_cpt_replaces_that_of_torchrun(self, repository: Repository, status: int) -> None:
        """torchrun exits with 1 on every failure; titan_cpt wrote its own status to a file."""
        done = repository.run(
            "run_train.sh", NPROC="2", ACTION=f'echo {status} > "$TITAN_CPT_STATUS_FILE"; echo why >&2; exit 1'
        )

        assert done.returncode == status
        assert done.stderr.splitlines()[1:] == ["why"]

    @pytest.mark.parametrize("written", ["", "0", "nonsense"], ids=["nothing", "success", "no number"])
    def test_a_failure_never_becomes_a_success(self, repository: Repository, written: str) -> None:
        """A failure of torchrun without a valid status file is 1, and its files are removed."""
        done = repository.run(
            "run_train.sh", NPROC="2", ACTION=f'printf "%s" "{written}" > "$TITAN_CPT_STATUS_FILE"; exit 1'
        )

        assert done.returncode == 1
        assert list((repository.folder.parent / "tmp").iterdir()) == []

    def test_a_stale_status_file_does_not_change_success(self, repository: Repository) -> None:
        """A status of an earlier attempt is ignored if torchrun exits with 0."""
        action = 'echo 1 > "$TITAN_CPT_STATUS_FILE"; exit 0'

        assert repository.run("run_train.sh", NPROC="2", ACTION=action).returncode == 0

    @pytest.mark.parametrize(("status", "shown"), [(1, 1), (2, 1), (75, 0)])
    def test_errors_of_hidden_processes_are_shown_after_a_failure(
        self, repository: Repository, status: int, shown: int
    ) -> None:
        """If only processes that are not printed know the reason, it is printed at the end, once if they agree."""
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
        """The message of the printed process is not repeated, and consequential errors are not printed."""
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

    def test_on_several_nodes_the_launcher_reports_config_errors(self, repository: Repository) -> None:
        """The launcher prints the error once for all nodes; this script would print it on each node."""
        done = repository.run(
            "run_train.sh", NNODES="2", NODE_RANK="1", MASTER_ADDR="a", MASTER_PORT="1", RUN_INFO_STATUS="2"
        )

        assert option(repository.only_call(), "--node") == "1/2@a:1"
        assert done.returncode == 0

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_is_forwarded_and_the_script_waits(self, repository: Repository, number: signal.Signals) -> None:
        """torchrun receives the signal and has time to save; the script exits with the status of titan_cpt."""
        name = number.name.removeprefix("SIG")
        action = f"""
            trap 'sleep 0.3; echo saved; echo 75 > "$TITAN_CPT_STATUS_FILE"; exit 1' {name}
            echo ready; while :; do sleep 0.02; done"""
        assert signalled(repository, action, number) == (75, "saved\n")
        assert int(repository.only_call()["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) >= 600


@pytest.mark.parametrize("script", ["run_train.sh", "scripts/setup.sh", ".ci/run"])
def test_scripts_are_executable_and_strict(script: str) -> None:
    """They are executable, stop at the first failing command, and parse."""
    path = ROOT / script

    assert os.access(path, os.X_OK)
    assert "set -euo pipefail" in path.read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
