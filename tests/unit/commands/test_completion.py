"""Completion with TAB: what is offered, and that bash and zsh really complete."""

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import remote_checkpoints

from titan_cpt.cli import main
from titan_cpt.commands.completion import key_values, until_next_dot
from titan_cpt.config.schema import CompileConfig
from titan_cpt.runs.scenarios import ScenarioOptions, write_scenario

ENDS = ("action", "om")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a config, a run and a program `titan-cpt` on PATH."""
    monkeypatch.chdir(tmp_path)
    write_scenario("laptop", Path("mine.toml"), ScenarioOptions())
    (tmp_path / "outputs" / "quick").mkdir(parents=True)
    (tmp_path / "outputs" / "quick" / "plan.json").touch()
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "titan-cpt"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m titan_cpt "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_the_average_of_a_checkpoint_is_offered_beside_it(here):
    """Where a command reads weights; `anneal` continues training, which needs the optimizer state."""
    averaged = remote_checkpoints.save(Path("outputs/quick"), "english", 4)
    remote_checkpoints.save(Path("outputs/quick"), "english", 8)
    record = json.loads((averaged / "manifest.json").read_text())
    (averaged / "manifest.json").write_text(json.dumps(record | {"averaging": {"kind": "mean"}}))
    folders = [f"outputs/quick/english/step-0000000{step}/" for step in (4, 8)]

    assert offered("titan-cpt export outputs/quick/english/", here) == [folders[0], f"{averaged}@average", folders[1]]
    assert offered("titan-cpt verify outputs/quick/english/step-00000004@", here) == [f"{averaged}@average"]
    assert offered("titan-cpt anneal outputs/quick/english/", here) == folders


def offered(line, folder):
    """The completions of a command line, as the shell's function gets them."""
    answer = folder / "answer"
    request = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE": "1"}
    request |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    subprocess.run(["titan-cpt"], env=os.environ | request, check=True, capture_output=True)
    return answer.read_text(encoding="utf-8").split("\v")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tr", ["train", "track"]),
        ("plan m", ["mine.toml"]),
        ("plan mine.toml --wo", ["--world-size"]),
        ("plan mine.toml --tr", ["--trained-before", "--training."]),
        ("plan mine.toml --training.seq", ["--training.seq_len"]),
        ("train mine.toml --job.seed 3 --stages.", ["--stages.english.", "--stages.german."]),
        ("train --config mine.toml --stages.german.replay.fr", [f"--stages.german.replay.fr{end}" for end in ENDS]),
        ("train mine.toml --compile.enable ", ["true", "false"]),
        ("train mine.toml --stages.german.optimizer_state ", ["reset", "keep"]),
        ("export a b --dtype ", ["bfloat16", "float32"]),
        ("report ", ["outputs/quick/"]),
        ("report out", ["outputs/"]),
        ("completion ", ["bash", "zsh", "fish"]),
        ("report --training", [""]),
    ],
)
def test_what_is_offered(here, line, words):
    """Commands, options, keys word by word with the stages of the file, values, files and runs."""
    assert offered(f"titan-cpt {line}", here) == words


@pytest.mark.parametrize(
    ("shell", "start"),
    [
        ("bash", "PS1='ready> '\n"),
        ("zsh", "PROMPT='ready> '\nautoload -U compinit && compinit -u -D\n"),
    ],
)
def test_a_shell_completes(here, shell, start):
    """The script is evaluated as its help says; a TAB completes, with a space only where a word ends."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    interactive = ["bash", "--norc", "--noprofile", "-i"] if shell == "bash" else ["zsh", "-f", "-i"]
    terminal, other = pty.openpty()
    environment = os.environ | {"TERM": "dumb", "INPUTRC": os.devnull, "HOME": str(here)}
    ends = {"stdin": other, "stdout": other, "stderr": other}
    with subprocess.Popen(interactive, **ends, env=environment, start_new_session=True) as it:
        os.close(other)
        try:
            os.write(terminal, f'{start}eval "$(titan-cpt completion {shell})"; echo re""ady\n'.encode())
            wait_for(terminal, r"\nready\r")
            os.write(terminal, b"titan-cpt trai\t")
            wait_for(terminal, r"trai\S*n ")
            os.write(terminal, b"mi\t")
            wait_for(terminal, r"ne\.toml ")
            os.write(terminal, b"--sta\tg\trepl\tfra\t")
            wait_for(terminal, r"--sta\S*ges\.g\S*erman\.repl\S*ay\.fra\S*ction ")
        finally:
            it.kill()
            os.close(terminal)


def wait_for(terminal, pattern):
    """Read the terminal until its output matches."""
    text, end = "", time.monotonic() + 60
    while not re.search(pattern, text):
        assert time.monotonic() < end, f"{pattern!r} did not appear in {text!r}"
        if select.select([terminal], [], [], 0.2)[0]:
            text += os.read(terminal, 4096).decode(errors="replace")


def test_the_script_of_each_shell_names_the_program(capsys):
    """A fourth shell is refused with those that exist."""
    for shell in ("bash", "zsh", "fish"):
        with pytest.raises(SystemExit) as leaving:
            main(["completion", shell])
        assert leaving.value.code == 0
        assert "titan-cpt" in capsys.readouterr().out
    with pytest.raises(SystemExit) as leaving:
        main(["completion", "tcsh"])
    assert leaving.value.code == 2
    assert "SHELL: must be one of bash, zsh, fish, got 'tcsh'" in capsys.readouterr().err


def test_a_key_is_offered_word_by_word():
    """Up to the dot that follows the prefix; files are offered whole."""
    assert until_next_dot("--stages.german.lr.max", "--st") == "--stages."
    assert until_next_dot("--stages.german.lr.max", "--stages.") == "--stages.german."
    assert until_next_dot("--stages.german.lr.max", "--stages.german.lr.m") == "--stages.german.lr.max"
    assert until_next_dot("mine.toml", "m") == "mine.toml"


def test_values_of_a_key_are_those_of_the_schema():
    """A number or a string has none."""
    fields = CompileConfig.model_fields
    assert key_values(fields["enable"].annotation) == ["true", "false"]
    assert key_values(fields["scope"].annotation) == ["block", "model"]
    assert key_values(int | None) == []
