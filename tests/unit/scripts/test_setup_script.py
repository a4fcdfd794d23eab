"""scripts/setup.sh with a Python that installs nothing."""

from pathlib import Path

import pytest
from shell_repository import Repository

# A stand-in for Python before and after `-m venv`: what is installed is a folder of marker files.
FAKE_PYTHON = """#!/usr/bin/env bash
marks=$(dirname -- "$CALLS")/marks; mkdir -p "$marks"
case "$*" in
    --version) echo "Python ${VERSION:-3.11.7}" ;;
    "-c import sys; sys.exit(sys.version_info < (3, 10))") [[ ${VERSION:-3.11.7} != 3.9.* ]] ;;
    "-c import ensurepip, venv") [[ -z ${NO_VENV:-} ]] ;;
    "-c import sys; sys.exit(sys.prefix == sys.base_prefix)") [[ $0 == */.venv/bin/python ]] ;;
    "-c import torch; torch.empty(1)")
        [[ $0 == */.venv/bin/python && -e $marks/torch ]] ||
            [[ -n ${SYSTEM_TORCH:-} && ($0 != */.venv/* || -e $marks/shared) ]] ;;
    "-c import sys, torch; sys.exit(torch.__version__ < '2.11')") [[ $SYSTEM_TORCH != 2.9* ]] ;;
    "-c from importlib.metadata import version; "*) echo "torch===$SYSTEM_TORCH" ;;
    "-m pip --version") [[ -e $marks/pip ]] ;;
    "-I - "*) cat >/dev/null; [[ -e $marks/package && " $(cat "$marks/package") " == *"[${!#}]"* ]] ;;
    *)
        printf '%s\\n' "$*" >>"$CALLS"
        case "$*" in
            "-m venv --clear "* | "-m venv "*)
                [[ $2 == venv && $3 == --clear ]] && rm -rf "${!#}"
                mkdir -p "${!#}/bin"; cp "$0" "${!#}/bin/python"; touch "$marks/pip"
                [[ $* != *--system-site-packages* ]] || touch "$marks/shared" ;;
            "-m ensurepip --upgrade") [[ -z ${NO_ENSUREPIP:-} ]] && touch "$marks/pip" ;;
            "-m pip install --editable "*) echo "$5" >"$marks/package" ;;
            "-m pip install "*) touch "$marks/torch" ;;
        esac ;;
esac
"""


class TestSetup:
    """scripts/setup.sh with a Python that installs nothing."""

    @pytest.fixture
    def machine(self, tmp_path: Path) -> Repository:
        """A fresh clone on a machine whose python3 is the stand-in."""
        repository = Repository(tmp_path)
        repository.add_tool(repository.tools / "python3", FAKE_PYTHON)
        return repository

    def installs(self, machine: Repository) -> list[str]:
        """The commands that changed something, in order."""
        if not machine.calls_file.exists():
            return []
        return machine.calls_file.read_text(encoding="utf-8").splitlines()

    def test_a_bare_machine_gets_everything(self, machine: Repository) -> None:
        """Environment, torch, and the package with the extra of the quick start; every command is printed."""
        done = machine.run("scripts/setup.sh")

        assert done.returncode == 0, done.stderr
        assert self.installs(machine) == [
            f"-m venv {machine.folder}/.venv",
            "-m pip install torch==2.13.0",
            f"-m pip install --editable {machine.folder}[hf]",
        ]
        assert [line.startswith("+ ") for line in done.stdout.splitlines()].count(True) == 3

    def test_the_given_extras_are_installed(self, machine: Repository) -> None:
        """One or several."""
        machine.run("scripts/setup.sh", "test", "hf")

        assert self.installs(machine)[-1] == f"-m pip install --editable {machine.folder}[test,hf]"

    def test_an_unknown_extra_is_refused(self, machine: Repository) -> None:
        """pip would only warn; the message lists the known extras."""
        done = machine.run("scripts/setup.sh", "tets")

        assert done.returncode == 2
        assert "no extra is called 'tets'" in done.stderr
        assert " test " in done.stderr
        assert self.installs(machine) == []

    def test_torch_comes_from_the_index_named(self, machine: Repository) -> None:
        """TORCH_INDEX_URL chooses the build."""
        machine.run("scripts/setup.sh", TORCH_INDEX_URL="https://example.org/cpu")

        assert "-m pip install --index-url https://example.org/cpu torch>=2.11" in self.installs(machine)

    @pytest.mark.parametrize("index", [{}, {"TORCH_INDEX_URL": "https://example.org/cpu"}], ids=["pip's", "another"])
    def test_a_chosen_version_of_torch_is_installed(self, machine: Repository, index: dict[str, str]) -> None:
        """From either index."""
        machine.run("scripts/setup.sh", TORCH="2.15.0", **index)

        (command,) = (line for line in self.installs(machine) if "torch==" in line)
        assert command.endswith(" torch==2.15.0")
        assert ("example.org" in command) == bool(index)

    def test_the_torch_of_a_container_is_used_and_kept(self, machine: Repository) -> None:
        """.venv sees it; none is installed, and no requirement of another package may replace it."""
        done = machine.run("scripts/setup.sh", TORCH="system", SYSTEM_TORCH="2.12.0a0+b558c98")

        assert done.returncode == 0, done.stderr
        venv = machine.folder / ".venv"
        assert self.installs(machine) == [
            f"-m venv --system-site-packages {venv}",
            f"-m pip install --editable {machine.folder}[hf] --constraint {venv}/torch.txt",
        ]
        assert (venv / "torch.txt").read_text() == "torch===2.12.0a0+b558c98\n"

    def test_a_torch_beside_the_interpreter_is_mentioned(self, machine: Repository) -> None:
        """Another one is installed unless the user chooses it."""
        done = machine.run("scripts/setup.sh", SYSTEM_TORCH="2.12.0")

        assert "has torch already; to use that one, interrupt this and run: TORCH=system" in done.stdout
        assert "-m pip install torch==2.13.0" in self.installs(machine)

    @pytest.mark.parametrize(
        ("environment", "message"),
        [
            ({"TORCH": "system"}, "has no torch that"),
            ({"TORCH": "system", "SYSTEM_TORCH": "2.9.1"}, "needs torch 2.11 or newer"),
            ({"TORCH": "newest"}, "TORCH must be a version of torch, such as 2.15.0, or 'system'; got 'newest'"),
            ({"TORCH": "system", "TORCH_INDEX_URL": "x"}, "TORCH=system installs no torch"),
        ],
        ids=["none", "too old", "no version", "index"],
    )
    def test_a_torch_that_cannot_be_used_is_refused(
        self, machine: Repository, environment: dict[str, str], message: str
    ) -> None:
        """Before any package is installed."""
        done = machine.run("scripts/setup.sh", **environment)

        assert done.returncode == 2
        assert message in done.stderr
        assert not any("pip install" in line for line in self.installs(machine))

    def test_a_second_run_does_nothing(self, machine: Repository) -> None:
        """Nothing is installed again."""
        machine.run("scripts/setup.sh")
        machine.calls_file.unlink()

        done = machine.run("scripts/setup.sh")

        assert done.returncode == 0, done.stderr
        assert "nothing to do" in done.stdout
        assert self.installs(machine) == []

    def test_an_installed_torch_is_kept(self, machine: Repository) -> None:
        """A second extra updates the package and does not touch torch."""
        machine.run("scripts/setup.sh")
        machine.calls_file.unlink()

        machine.run("scripts/setup.sh", "test")

        assert self.installs(machine) == [f"-m pip install --editable {machine.folder}[test]"]

    def test_an_incomplete_environment_is_made_again(self, machine: Repository) -> None:
        """A .venv without a Python, as an interrupted run leaves it."""
        (machine.folder / ".venv/lib").mkdir(parents=True)

        done = machine.run("scripts/setup.sh")

        assert done.returncode == 0, done.stderr
        assert self.installs(machine)[0] == f"-m venv --clear {machine.folder}/.venv"

    def test_an_environment_without_pip_gets_pip(self, machine: Repository) -> None:
        """An interruption between Python and pip, or an environment made by uv; its packages stay."""
        machine.run("scripts/setup.sh")
        machine.calls_file.unlink()
        (machine.folder.parent / "marks/pip").unlink()

        done = machine.run("scripts/setup.sh")

        assert done.returncode == 0, done.stderr
        assert self.installs(machine) == ["-m ensurepip --upgrade"]

    @pytest.mark.parametrize(
        ("environment", "messages"),
        [
            ({"VERSION": "3.9.2"}, ["needs Python 3.10 or newer; found Python 3.9.2", "PYTHON="]),
            ({"NO_VENV": "yes"}, ["cannot make virtual environments", "apt-get install python3-venv"]),
            ({"PYTHON": "python3.77"}, ["found no python3.77", "PYTHON="]),
        ],
        ids=["too old", "no venv", "no such interpreter"],
    )
    def test_an_unsuitable_machine_gets_a_message_with_the_remedy(
        self, machine: Repository, environment: dict[str, str], messages: list[str]
    ) -> None:
        """What was found, what is needed and what to do; no files are written."""
        done = machine.run("scripts/setup.sh", **environment)

        assert done.returncode == 2
        assert all(message in done.stderr for message in messages), done.stderr
        assert not (machine.folder / ".venv").exists()

    def test_python_selects_the_interpreter(self, machine: Repository) -> None:
        """Also one that is not on PATH."""
        other = machine.folder.parent / "other/python3.12"
        machine.add_tool(other, FAKE_PYTHON)

        done = machine.run("scripts/setup.sh", PYTHON=str(other))

        assert done.returncode == 0, done.stderr
        assert f"{other} -m venv" in done.stdout
