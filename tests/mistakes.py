"""The mistakes of mistakes.toml, made in a copy of a small playground: a config, texts, token files, a finished run.

Each command runs as `titan_cpt.cli.main` in a process forked from a server that has torch imported, or, if it begins
with `./run_train.sh`, as that script. `python scripts/docs/mistakes_page.py` makes docs/mistakes.md from the same runs.
"""

from __future__ import annotations

import io
import os
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path

import training
from permissions import ModesCount

from titan_cpt.cli import main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LIGHT = ("plan", "runs", "init", "convert-config", "sweep", "baselines", "trian")  # start without torch
_MAY_CHANGE = (".out", ".err", "outputs/mine/.lock", "outputs/mine/metrics.jsonl", "outputs/mine/logs/rank-0.log")
ROOT = Path(__file__).resolve().parents[1]
CONFIG = """\
[job]
name = "mine"

[model]
family = "gpt_neox"
size = "debug"

[tokenizer]
path = "bytes"

[datasets.english]
train = "data/english"
validation = "data/english-validation"

[datasets.german]
train = "data/german"
validation = "data/german-validation"

[training]
global_batch_size = 4
local_batch_size = 2
seq_len = 16
mixed_precision_param = "float32"

[checkpoint]
interval = 4

[metrics]
enable_tensorboard = false

[validation]
sequences = 4

[[stages]]
name = "first"
dataset = "english"
steps = 6
lr = { schedule = "infinite_cosine", max = 3e-3, constant = 2e-3, cooldown_until = 0.5, constant_until = 0.75 }

[[stages]]
name = "second"
dataset = "german"
steps = 4
lr = { schedule = "cosine", max = 2e-3 }
replay = { fraction = 0.25 }
"""


@dataclass(frozen=True)
class Mistake:
    """One mistake.

    Attributes:
        did: what the user did, in a few words.
        command: what the user typed.
        says: parts of the message: what was found, where, what is allowed, what to do.
        replace: (old, new) texts in mine.toml.
        append: text at the end of mine.toml.
        setup: shell commands in the playground before the command.
        environment: variables that are set.
        unprivileged: file modes count, also for root.
    """

    topic: str
    did: str
    command: str
    says: list[str]
    replace: list[list[str]] = field(default_factory=list)
    append: str = ""
    setup: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    unprivileged: bool = False


@dataclass(frozen=True)
class Answer:
    """Exit status, standard error and standard output of a command, and files that it changed or removed."""

    status: int
    message: str
    output: str
    changed: list[str] = field(default_factory=list)


def read_mistakes() -> list[Mistake]:
    """All of mistakes.toml."""
    tables = tomllib.loads((ROOT / "tests" / "mistakes.toml").read_text(encoding="utf-8"))
    return [Mistake(topic=topic, **entry) for topic, entries in tables.items() for entry in entries]


def make_playground(folder: Path) -> Path:
    """The folder in which mistakes are made: each mistake gets a copy of it."""
    folder.mkdir(parents=True)
    (folder / "mine.toml").write_text(CONFIG)
    (folder / "text").mkdir()
    (folder / "text" / "english.jsonl").write_text('{"text": "the cat sat on the mat"}\n' * 40)
    for number, name in enumerate(("english", "german"), 1):
        training.write_tokens(folder / "data" / name, language=number, tokens=4000)
        training.write_tokens(folder / "data" / f"{name}-validation", language=number, tokens=700, seed=1)
    for command in (
        "prepare --input text/english.jsonl --output data/prepared --tokenizer bytes",
        "train mine.toml",
        "export outputs/mine/second/step-00000004 hf",
    ):
        answer = _in_process(shlex.split(command), folder, {}, unprivileged=False)
        assert answer.status == 0, answer
    return folder


def make(mistake: Mistake, playground: Path, folder: Path) -> Answer:
    """Make a mistake in a copy of the playground."""
    shutil.copytree(playground, folder)
    config = folder / "mine.toml"
    text = config.read_text()
    for old, new in mistake.replace:
        assert text.count(old) >= 1, f"{old!r} is not in mine.toml"
        text = text.replace(old, new, 1)
    config.write_text(text + mistake.append)
    if mistake.setup:
        subprocess.run(["bash", "-euc", mistake.setup], cwd=folder, check=True, timeout=30)
    before = _files(folder)
    answer = _answer(mistake, shlex.split(mistake.command), folder)
    subprocess.run(["chmod", "-R", "u+rwX", str(folder)], check=True, timeout=30)
    after = _files(folder)
    changed = [path for path, content in before.items() if after.get(path) != content and path not in _MAY_CHANGE]
    return replace(answer, changed=changed)


def _answer(mistake: Mistake, words: list[str], folder: Path) -> Answer:
    if words[0] == "./run_train.sh":
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        command = ["bash", str(ROOT / "run_train.sh"), *words[1:]]
        environment |= {"PYTHONPATH": str(ROOT), **mistake.environment}
        ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
        return Answer(ended.returncode, ended.stderr, ended.stdout)
    if words[0] in _LIGHT and not mistake.unprivileged:
        return _here(words, folder)
    return _in_process(words, folder, mistake.environment, unprivileged=mistake.unprivileged)


def _files(folder: Path) -> dict[str, bytes]:
    """The content of every file."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and os.access(path, os.R_OK)
    }


def _here(words: list[str], folder: Path) -> Answer:
    """Run a command that needs no process of its own."""
    out, err = io.StringIO(), io.StringIO()
    before = Path.cwd()
    os.chdir(folder)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main(words)
    except SystemExit as leaving:
        return Answer(int(leaving.code or 0), err.getvalue(), out.getvalue())
    finally:
        os.chdir(before)


def _in_process(words: list[str], folder: Path, environment: dict[str, str], *, unprivileged: bool) -> Answer:
    out, err = folder / ".out", folder / ".err"
    arguments = (words, str(folder), environment, unprivileged)
    process = training._server().Process(target=_child, args=arguments)
    process.start()
    process.join(60)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"{words} did not end: {err.read_text()}")
    return Answer(process.exitcode, err.read_text(), out.read_text())


def _child(words: list[str], folder: str, environment: dict[str, str], unprivileged: bool) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    for number, name in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), number)
    if unprivileged:
        ModesCount().lay()
    main(words)
