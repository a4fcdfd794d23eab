"""The code blocks of a page of the documentation, and what is needed to run them: small inputs and small numbers.

HTML comments above a block, invisible to readers, say how it is tested (CONTRIBUTING.md, "Commands in the docs"):

    <!-- given: text raw/german/a.jsonl; config mine.toml; run outputs/mine -->    what exists before the block
    <!-- file: mine.toml -->          the block is this file
    <!-- append: mine.toml -->        the block is appended to this file
    <!-- not run: needs Slurm -->     the block is only parsed, for this reason
"""

from __future__ import annotations

import array
import copy
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import prepared
import tomli_w
import zstandard
from forked_commands import ROOT, Shell
from markdown_it import MarkdownIt
from markdown_it.token import Token

from titan_cpt.common.weights.named_weights import split_average, suffix_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

COMMANDS = ("bash", "python")
OTHERS = ("toml", "text", "json", "yaml", "dockerfile", "diff")
DIRECTIVE = re.compile(r"<!-- (given|file|append|not run): (.*?) -->", re.DOTALL)
STEPS = 3  # of a stage, in place of its `tokens` or `steps`
TRAINING = {"global_batch_size": 16, "local_batch_size": 1, "seq_len": 64, "mixed_precision_param": "float32"}
SMALL_OPTIONS = {
    "--train-tokenizer": "300",
    "--vocab-size": "384",
    "--limit": "4",
    "--add": "20",
}  # in place of what a page says


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        line: of the page, from 1.
        language: the word after the fence; "" without one.
        directives: the comments directly above it, as (name, text).
    """

    line: int
    language: str
    text: str
    directives: tuple[tuple[str, str], ...] = ()

    def said(self, name: str) -> str | None:
        """The text of a directive."""
        return dict(self.directives).get(name)

    @property
    def runs(self) -> bool:
        """Whether the block is commands that can run here."""
        return self.language in COMMANDS and self.said("not run") is None and self.said("file") is None

    @property
    def given(self) -> list[tuple[str, str]]:
        """What exists before the block: (kind, its path and more)."""
        return [
            (what.split()[0], what.split(None, 1)[1]) for what in (self.said("given") or "").split(";") if what.strip()
        ]

    @property
    def files(self) -> Iterator[tuple[str, bool]]:
        """The file that the block is, or is appended to, and whether it is appended."""
        for name, text in self.directives:
            if name in ("file", "append"):
                yield text, name == "append"


def blocks(page: Path) -> list[Block]:
    """All code blocks of a page, in order."""
    found, above = [], []
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block":
            above += [(name, " ".join(text.split())) for name, text in DIRECTIVE.findall(token.content)]
        elif token.type in ("fence", "code_block"):
            found.append(_block(token, tuple(above)))
            above = []
        elif token.type == "inline":
            above = []
    return found


def _block(token: Token, above: tuple[tuple[str, str], ...]) -> Block:
    assert token.map is not None, "every block has its lines"
    return Block(token.map[0] + 1, token.info.strip(), token.content, above)


# Small numbers


def small(text: str) -> str:
    """The TOML of a config, or of a part of one, with the debug model, short sequences and stages of STEPS steps."""
    raw = tomllib.loads(text)
    if not {"stages", "model", "training", "sweep"} & raw.keys():
        return text
    raw = copy.deepcopy(raw)
    if "model" in raw:
        raw["model"] = {"family": raw["model"].get("family", "gpt_neox"), "size": "debug"}
    if "train" in raw.get("tokenizer", {}):
        raw["tokenizer"]["train"]["vocab_size"] = 300
    if "add" in raw.get("tokenizer", {}).get("extend", {}):
        raw["tokenizer"]["extend"]["add"] = 20
    if "training" in raw:
        raw["training"] |= TRAINING
    if "checkpoint" in raw:
        raw["checkpoint"].pop("interval", None)
    for stage in raw.get("stages", []):
        if "tokens" in stage or "steps" in stage:
            stage.pop("tokens", None)
            stage["steps"] = STEPS
    for number, (key, values) in enumerate(_lists(raw.get("sweep", {}))):
        values[:] = values[: 2 if number == 0 or key == "zip" else 1]
    return tomli_w.dumps(raw)


def _lists(table: dict[str, Any], key: str = "") -> Iterator[tuple[str, list[Any]]]:
    """The lists of a [sweep] table, each with "zip" or the name of its outermost table."""
    for name, value in table.items():
        if isinstance(value, list):
            yield key or name, value
        elif isinstance(value, dict):
            yield from _lists(value, key or name)


def small_arguments(arguments: list[str]) -> list[str]:
    """The arguments of a command with small numbers, and with a checkpoint that exists in place of a later one."""
    new = list(arguments)
    for place, (option, value) in enumerate(pairwise(arguments)):
        if option in SMALL_OPTIONS:
            new[place + 1] = SMALL_OPTIONS[option]
        elif option == "--tokens" and value[-1] in "MB":
            new[place + 1] = str(STEPS * TRAINING["global_batch_size"] * TRAINING["seq_len"])
        elif re.fullmatch(r"--stages\.\w+\.(steps|tokens)", option):
            new[place : place + 2] = [option.rpartition(".")[0] + ".steps", str(STEPS)]
    choose = min if arguments[0] == "anneal" else max  # the stage end is behind the constant phase
    return [_existing_step(word, choose) for word in new]


def _existing_step(word: str, choose: Callable[..., Path]) -> str:
    name, average = split_average(word)
    path = Path(name)
    if re.fullmatch(r"step-\d{8}", path.name) and not path.exists() and path.parent.exists():
        return f"{choose(path.parent.glob('step-*'), default=path)}{suffix_of(average)}"
    return word


# What exists before a block


@dataclass
class Sandbox:
    """A folder with what a page says exists. It looks like the repository's root."""

    shell: Shell

    @property
    def folder(self) -> Path:
        """Where commands run."""
        return self.shell.folder

    def write(self, name: str, text: str, *, append: bool) -> None:
        """Write the file of a block, with small numbers if it is a config."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shown = small(text) if path.suffix == ".toml" else text
        path.write_text((path.read_text() + "\n" if append else "") + shown)

    def provide(self, kind: str, what: str) -> None:
        """Make what a `given` directive names: a path and, for some kinds, another word."""
        makers: dict[str, Any] = {
            "text": self.text,
            "foreign": self.foreign,
            "tokenizer": self.tokenizer,
            "tokens": self.tokens,
            "config": self.config,
            "run": self.run,
            "release": self.release,
            "copy": self.copy,
            "presequenced": self.presequenced,
            "page": self.page,
        }
        assert kind in makers, f"given: {kind!r} is not one of {', '.join(makers)}"
        makers[kind](*what.split())

    def text(self, path: str) -> None:
        """200 documents, in the format of the suffix."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = prepared.jsonl(prepared.words(200, sum(path.encode()))).encode()
        if target.suffix == ".zst":
            lines = zstandard.compress(lines)
        if target.suffix == ".txt":  # a file is one document
            for number, words in enumerate(prepared.words(200)):
                target.with_stem(f"{target.stem}-{number}").write_text(words)
        else:
            target.write_bytes(lines)

    def foreign(self, path: str) -> None:
        """200 documents of words that a given tokenizer has no tokens for: those of other texts, written backwards."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(prepared.jsonl([text[::-1] for text in prepared.words(200, sum(path.encode()))]))

    def tokenizer(self, path: str) -> None:
        """A tokenizer.json of 300 entries."""
        self.text("given/text.jsonl")
        self._run(f"titan-cpt prepare --input given/text.jsonl --output {path} --train-tokenizer 300")

    def tokens(self, prefix: str, tokenizer: str = "bytes") -> None:
        """Prepared tokens PREFIX and PREFIX-validation."""
        self.text(f"given/{Path(prefix).name}.jsonl")
        source = f"given/{Path(prefix).name}.jsonl"
        self._run(f"titan-cpt prepare --input {source} --output {prefix} --tokenizer {tokenizer} --holdout 0.2")

    def config(self, path: str) -> None:
        """The config of README.md, "Your own run", and its text, under another name."""
        for language in ("english", "german"):
            if not (self.folder / f"text/{language}").exists():
                self.text(f"text/{language}/a.jsonl")
        self.write(path, config_named(Path(path).stem), append=False)

    def run(self, path: str) -> None:
        """A finished run of this config: outputs/NAME."""
        config = f"given/{Path(path).name}.toml"
        self.config(config)
        self._run(f"titan-cpt train --config {config} --job.output_dir {Path(path).parent}")

    def release(self, path: str) -> None:
        """A released GPT-NeoX with random weights, as transformers saves it."""
        from releases import SPECS, release

        release(self.folder / path, SPECS["gpt_neox"])

    def copy(self, path: str) -> None:
        """A file or folder of the repository."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / path).is_dir():
            shutil.copytree(ROOT / path, target)
        else:
            text = (ROOT / path).read_text()
            target.write_text(small(text) if target.suffix == ".toml" else text)

    def presequenced(self, path: str) -> None:
        """Sequences of seq_len + 1 random tokens below 300, as uint16 without a header."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        draw = random.Random(1)
        tokens = array.array("H", [draw.randrange(300) for _ in range(200 * (TRAINING["seq_len"] + 1))])
        target.write_bytes(tokens.tobytes())

    def page(self, path: str) -> None:
        """All that an earlier page makes and runs."""
        self.run_blocks(ROOT / path)

    def run_blocks(self, page: Path) -> None:
        """Run the commands of a page in its order, and make what their comments name. AssertionError if one fails."""
        for block in blocks(page):
            for kind, what in block.given:
                self.provide(kind, what)
            for name, append in block.files:
                self.write(name, block.text, append=append)
            if not block.runs:
                continue
            if block.language == "python":
                (self.folder / "block.py").write_text(block.text)
            status, output = self.shell.run(block.text if block.language == "bash" else "python block.py")
            assert status == 0, f"{page.relative_to(ROOT)}:{block.line}\n{block.text}\n{output[-6000:]}"

    def _run(self, command: str) -> None:
        status, output = self.shell.run(command)
        assert status == 0, f"given: {command}\n{output}"


def config_named(name: str) -> str:
    """The config of README.md with another job.name."""
    (text,) = (block.text for block in blocks(ROOT / "README.md") if block.said("file") == "mine.toml")
    return text.replace('name = "mine"', f'name = "{name}"')


def pages_before(page: Path) -> list[Path]:
    """The pages that a page continues (`given: page`)."""
    return [ROOT / path for block in blocks(page) for kind, path in block.given if kind == "page"]


def files_of(page: Path) -> dict[str, str]:
    """The files that a page and the pages before it (`given: page`) consist of, with the numbers of the pages."""
    found: dict[str, str] = {}
    for earlier in pages_before(page):
        found |= files_of(earlier)
    for block in blocks(page):
        for kind, path in block.given:
            if kind == "config":
                found[path] = config_named(Path(path).stem)
        for name, append in block.files:
            found[name] = (found[name] + "\n" if append else "") + block.text
    return found
