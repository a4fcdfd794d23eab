""".ci/run: the README's test command, then lint, format and types; the first failure ends it."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TEST_COMMAND = "./scripts/setup.sh test && .venv/bin/pytest"
PROGRAMS = ("scripts/setup.sh", ".venv/bin/pytest", ".venv/bin/ruff", ".venv/bin/mypy")
ALL_CALLS = ["setup.sh test", "pytest", "ruff check", "ruff format --check", "mypy"]


def run_checks(folder, failing=""):
    """(exit status, calls in order) of .ci/run in a repository whose programs write down how they were called.

    Args:
        failing: the call that ends with status 3.
    """
    (folder / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci")
    calls = folder / "calls.txt"
    for program in PROGRAMS:
        path = folder / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f'#!/usr/bin/env bash\ncall="{path.name}${{*:+ $*}}"\n'
            f'echo "$call" >>"{calls}"\n[[ "$call" != "{failing}" ]] || exit 3\n'
        )
        path.chmod(0o755)
    done = subprocess.run(
        [folder / ".ci" / "run"], cwd="/", env={"PATH": os.environ["PATH"]}, capture_output=True, timeout=60
    )
    return done.returncode, calls.read_text().splitlines()


def test_the_test_command_is_that_of_the_readme_word_for_word():
    """README.md shows it as a line of a code block, with or without a comment behind it."""
    code = "\n".join(
        re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    )

    assert TEST_COMMAND in [line.partition("#")[0].strip() for line in code.splitlines()]
    assert f"check '{TEST_COMMAND}'" in (ROOT / ".ci" / "run").read_text().splitlines()


def test_all_checks_run_in_order(tmp_path):
    """From any working directory."""
    assert run_checks(tmp_path / "a repository") == (0, ALL_CALLS)


@pytest.mark.parametrize("failing", ALL_CALLS)
def test_the_first_failing_check_ends_it_with_its_status(tmp_path, failing):
    """Also a failing setup, which comes before `&&`."""
    status, calls = run_checks(tmp_path, failing)

    assert status == 3
    assert calls == ALL_CALLS[: ALL_CALLS.index(failing) + 1]
