"""The command line as a whole: every command and option is explained; options of other releases still work."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from titan_cpt.cli import main, make_parser

ROOT = Path(__file__).parents[3]
COMMANDS = next(action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction))
NAMES = [
    *("plan", "train", "sweep", "baselines", "prepare", "import", "export", "anneal", "eval", "generate", "report"),
    "verify",
]


def status_of(*words):
    with pytest.raises(SystemExit) as leaving:
        main([str(word) for word in words])
    return leaving.value.code


def test_help_lists_every_command_with_a_line(capsys):
    """In the order of a user's work."""
    assert list(COMMANDS.choices) == NAMES
    assert status_of("--help") == 0
    assert all(action.help for action in COMMANDS._choices_actions)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_says_what_it_does(name):
    """Each option has a help text and, if it takes a value, a metavar; hidden options are old names of others."""
    for action in COMMANDS.choices[name]._actions:
        assert action.help
        if action.nargs != 0 and action.help != argparse.SUPPRESS:
            assert action.metavar or action.choices, action.dest


@pytest.mark.parametrize(("new", "old"), [("--batch", "--recipe")])
def test_the_old_name_of_an_option_of_plan_works(write, two_stages, capsys, new, old):
    """The answer is under the name that was used."""
    config = write(two_stages)
    answers = []
    for option in (new, old):
        assert status_of("plan", "--config", config, option, "second", "3") == 0
        answers.append(capsys.readouterr().out.replace(f'"{option[2:]}"', '"batch"'))

    assert answers[0] == answers[1]
    assert '"batch": [[' in answers[0]


def test_the_old_name_of_sweep_index_works():
    """Neither is shown beside the other."""
    options = [make_parser().parse_args(["sweep", "a.toml", word, "2"]) for word in ("--index", "--arm")]

    assert [option.index for option in options] == [2, 2]
    assert "--arm" not in COMMANDS.choices["sweep"].format_help()


def test_python_m_titan_cpt_is_the_same_program():
    """For an installation whose bin folder is not on PATH."""
    done = subprocess.run(
        [sys.executable, "-m", "titan_cpt", "--help"],
        env=os.environ,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0
    assert done.stdout.startswith("usage: titan-cpt ")


def test_a_reader_that_leaves_early_is_not_a_traceback(write, two_stages):
    """`titan-cpt plan ... | head -1`: status 1, as the shell's tools have it."""
    program = f"{sys.executable} -m titan_cpt plan --config {write(two_stages)} --json --lr-at $(seq -s, 1 3000)"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {program} | :"],
        env=os.environ,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
