"""The command line as a whole: every command and option is explained; options of other releases still work."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from titan_cpt.cli import main, make_parser, parse_command_line
from titan_cpt.config.schema_lookup import keys_of, tables_at

ROOT = Path(__file__).parents[3]
COMMANDS = next(action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction))
NAMES = [
    *("init", "convert-config", "doctor"),
    *("models", "plan", "train", "sweep", "baselines", "prepare", "tokenizer", "import", "export", "merge", "anneal"),
    *("eval", "generate", "runs", "report", "watch", "track", "verify", "upload", "docs", "completion"),
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


@pytest.mark.parametrize("name", [None, *NAMES])
def test_help_fits_a_screen(name, monkeypatch):
    """80 columns and 40 lines, the example included."""
    monkeypatch.setenv("COLUMNS", "80")
    lines = (COMMANDS.choices[name] if name else make_parser()).format_help().splitlines()

    assert len(lines) <= 40
    assert [line for line in lines if len(line) > 80] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_example_of_a_help_text_is_a_valid_command(name):
    """It is parsed as the command line parses it, and the keys that it overrides exist."""
    examples = COMMANDS.choices[name].get_default("example").splitlines()
    shown = COMMANDS.choices[name].format_help().splitlines()

    for example in examples:
        program, command, *words = shlex.split(re.sub(r'^eval "\$\((.*)\)"$', r"\1", example))
        options = parse_command_line([command, *words])
        assert (program, command) == ("titan-cpt", name)
        assert f"  {example}" in shown
        assert [key for key, _ in options.overrides if not tables_with(key)] == []
    assert examples


def tables_with(dotted):
    """The tables of the schema that have this key."""
    *tables, key = dotted.split(".")
    return [table for table in tables_at(tables) if key in keys_of(table)]


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


@pytest.mark.parametrize("command", ["plan", "train", "baselines", "sweep"])
def test_two_config_files_are_refused_and_the_same_file_twice_is_not(command, write, two_stages, capsys):
    """`FILE` and `--config FILE` are the same option; a sweep takes several files, and counts the same one once."""
    config = write(two_stages)
    other = config.with_name("other.toml")
    last = {"plan": "--json", "train": "--run-info", "baselines": "--output=x", "sweep": "--plan"}[command]
    if command != "sweep":
        assert status_of(command, config, "--config", other, last) == 2
        assert f"two files are given, {config} and --config {other}; remove one" in capsys.readouterr().err
        assert status_of(command, last) == 2
        assert f"the TOML file is missing; write `titan-cpt {command} FILE`" in capsys.readouterr().err
    if command != "baselines":
        assert status_of(command, config, "--config", config, last) == 0
