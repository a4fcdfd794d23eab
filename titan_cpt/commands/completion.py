"""`titan-cpt completion`: shell completion of commands, options, config keys with their stages, files and run folders.

argcomplete asks this program at each TAB, so the answers are those of the installed version and of the TOML file that
the command line names. A shell function that asks is printed by `titan-cpt completion SHELL`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from titan_cpt.commands.arguments import Subparsers, add_command
from titan_cpt.commands.parser import CommandParser
from titan_cpt.errors import TitanError

_SHELLS = ("bash", "zsh", "fish")
_REQUEST = "_ARGCOMPLETE"  # an environment variable that the shell function sets
_NEEDS_OPTIMIZER_STATE = " anneal"  # the command that takes no average
_RUNS = Path("outputs")  # the default of job.output_dir


def add_completion(subparsers: Subparsers) -> None:
    """The options of `completion`."""
    completion = add_command(
        subparsers,
        "completion",
        _run,
        "print a script for completion with TAB",
        details="Add the line of the example to ~/.bashrc, or to ~/.zshrc with zsh after compinit; for fish: titan-cpt "
        "completion fish > ~/.config/fish/completions/titan-cpt.fish",
        usage="SHELL",
        example='eval "$(titan-cpt completion bash)"',
    )
    completion.add_argument("shell", choices=_SHELLS, metavar="SHELL", help="bash, zsh or fish")


def _run(options: argparse.Namespace) -> int:
    from argcomplete.shell_integration import shellcode

    code = shellcode(["titan-cpt"], shell=options.shell)
    print(code.replace("[=/:]", "[=/:.]"))  # no space after `--training.`, which another word of the key follows
    return 0


def is_requested() -> bool:
    """Whether a shell has requested completions."""
    return _REQUEST in os.environ


def complete(parser: CommandParser) -> NoReturn:
    """Print the completions of the command line in COMP_LINE to the shell, and exit."""
    from argcomplete.finders import CompletionFinder

    class Finder(CompletionFinder):
        """Offers the next word of a dotted key, not all 160 keys at once."""

        def collect_completions(self, active_parsers: Any, parsed_args: Any, cword_prefix: str) -> list[str]:
            found = super().collect_completions(active_parsers, parsed_args, cword_prefix)
            return list(dict.fromkeys(until_next_dot(word, cword_prefix) for word in found))

    words = _words(os.environ.get("COMP_LINE", ""))
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                if name in words:
                    _teach(command, words)
    Finder()(parser, always_complete_options=False)
    raise SystemExit(0)  # the finder exits by itself


def until_next_dot(word: str, prefix: str) -> str:
    """The completion of a dotted key up to its next word; other completions as they are."""
    dot = word.find(".", len(prefix))
    return word[: dot + 1] if word.startswith("--") and dot >= 0 else word


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:  # an open quote
        return line.split()


def _teach(command: CommandParser, words: list[str]) -> None:
    """Add the completions that argparse does not know: values of arguments, and config keys as options."""
    values: dict[str, Callable[..., Iterable[str]]] = {
        **{"FILE": toml_files, "RUN": run_folders, "FOLDER": run_folders},
        "CHECKPOINT": run_folders if command.prog.endswith(_NEEDS_OPTIMIZER_STATE) else weights,
        **{"SCENARIO": _scenarios},
    }
    for action in command._actions:
        if isinstance(action.metavar, str) and action.metavar in values:
            action.completer = values[action.metavar]  # type: ignore[attr-defined]  # read by argcomplete
    if command.takes_overrides:
        command.takes_overrides = False  # keys are options now, so that argcomplete sees them
        for key, annotations in _keys(words).items():
            if "." not in key:
                continue  # [sweep], a table of other keys
            choices = [choice for annotation in annotations for choice in key_values(annotation)]
            command.add_argument(f"--{key}", choices=choices or None, metavar="VALUE")


def _keys(words: list[str]) -> dict[str, list[Any]]:
    """The keys of the schema, with the names of the datasets and stages of the TOML file on the command line."""
    from titan_cpt.config.schema_lookup import dotted_keys
    from titan_cpt.config.toml_files import read_with_bases

    names: dict[str, list[str]] = {"datasets": [], "stages": []}
    for word in words:
        if word.endswith(".toml") and os.path.isfile(word):
            try:
                raw = read_with_bases(Path(word))
                names["datasets"] += list(raw.get("datasets", {}))
                names["stages"] += [stage["name"] for stage in raw.get("stages", [])]
            except Exception:
                continue  # whatever is wrong with the file, the command itself reports it
    return dotted_keys(**names)


def key_values(annotation: Any) -> list[str]:
    """The values that a key can have, if they are few: true and false, or those of a Literal."""
    if annotation is bool:
        return ["true", "false"]
    if typing.get_origin(annotation) is typing.Literal:
        return [str(value) for value in typing.get_args(annotation)]
    return [value for inner in typing.get_args(annotation) for value in key_values(inner)]


def _scenarios(**_: object) -> Iterable[str]:
    from titan_cpt.runs.scenarios import SCENARIOS

    return SCENARIOS


def toml_files(prefix: str, **_: object) -> Iterator[str]:
    """Folders and TOML files that begin with the prefix."""
    return _paths(prefix, lambda path: path.name.endswith(".toml"))


def run_folders(prefix: str, **_: object) -> Iterator[str]:
    """Folders that begin with the prefix; without one, the runs in outputs/."""
    if prefix:
        yield from _paths(prefix, lambda path: False)
        return
    runs = [path for path in _paths(f"{_RUNS}/", lambda path: False) if (Path(path) / "plan.json").exists()]
    yield from runs or _paths("", lambda path: False)


def weights(prefix: str, **_: object) -> Iterator[str]:
    """As `run_folders`, and behind each checkpoint that holds an average the name of that."""
    from titan_cpt.common.weights.named_weights import AVERAGE, AVERAGE_SUFFIX

    for folder in run_folders(prefix):
        yield folder
        if _holds_average(Path(os.path.expanduser(folder))):
            yield f"{folder.rstrip('/')}{AVERAGE_SUFFIX}"
    folder, at, begun = prefix.rpartition("@")
    if at and AVERAGE.startswith(begun) and _holds_average(Path(os.path.expanduser(folder))):
        yield f"{folder}{AVERAGE_SUFFIX}"


def _holds_average(folder: Path) -> bool:
    from titan_cpt.checkpoint import manifest
    from titan_cpt.checkpoint.averages import has_average
    from titan_cpt.common.run_folder import MANIFEST_FILE

    try:
        return (folder / MANIFEST_FILE).is_file() and has_average(manifest.read(folder))
    except (TitanError, OSError):
        return False


def _paths(prefix: str, is_wanted: Callable[[os.DirEntry[str]], bool]) -> Iterator[str]:
    """Folders (with a final slash) and wanted files that begin with the prefix; hidden ones if it begins with a dot."""
    folder, _, beginning = prefix.rpartition("/")
    start = f"{folder}/" if "/" in prefix else ""
    try:
        with os.scandir(os.path.expanduser(start) or ".") as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith(beginning) and not (entry.name.startswith(".") and not beginning):
                    if entry.is_dir():
                        yield f"{start}{entry.name}/"
                    elif is_wanted(entry):
                        yield f"{start}{entry.name}"
    except OSError:
        return
