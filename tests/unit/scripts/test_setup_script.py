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
    "-c import torch; torch.empty(1)") [[ -e $marks/torch ]] ;;
    "-m pip --version") [[ -e $marks/pip ]] ;;
    "-I - "*) cat >/dev/null; [[ -e $marks/package && " $(cat "$marks/package") " == *"[${!#}]"* ]] ;;
    *)
        printf '%s\\n' "$*" >>"$CALLS"
        case "$*" in
            "-m venv --clear "* | "-m venv "*)
                [[ $2 == venv && $3 == --clear ]] && rm -rf "${!#}"
                mkdir -p "${!#}/bin"; cp "$0" "${!#}/bin/python"; touch "$marks/pip" ;;
            "-m ensurepip --upgrade") [[ -z ${NO_ENSUREPIP:-} ]] && touch "$marks/pip" ;;
            "-m pip install --editable "*) echo "${!#}" >"$marks/package" ;;
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

        assert "-m pip install --index-url https://example.org/cpu torch>=2.13" in self.installs(machine)

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
