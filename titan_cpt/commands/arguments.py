"""Shared by the command parsers: types of option values, options of several commands, config overrides."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from titan_cpt.commands.parser import CommandParser, split_overrides
from titan_cpt.errors import ConfigError

Subparsers: TypeAlias = "argparse._SubParsersAction[CommandParser]"  # no public name in argparse

CHECKPOINTS_HELP = "a checkpoint folder, or a run folder for the last checkpoint of each of its stages"
_OVERRIDES_HELP = (
    "Any config key can be overridden; a key that is true or false needs no value:\n"
    "  --training.seq_len 512 --stages.german.lr.max 1e-4 --compile.enable"
)
_HELP_WIDTH = 78  # argparse leaves two columns of a terminal empty


def add_command(
    subparsers: Subparsers,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    *,
    example: str,
    details: str = "",
    usage: str = "[options]",
    takes_overrides: bool = False,
) -> CommandParser:
    """Add a command's parser.

    Args:
        run: the handler; takes the parsed options and returns the exit status.
        summary: a phrase that says what the command does, for the list of commands.
        details: sentences that the command's own help adds to it.
        example: command lines that --help shows; the tests parse them.
        usage: the arguments, as --help shows them behind the command's name.
        takes_overrides: accept `--table.key VALUE` for every config key; they are passed as `options.overrides`.
    """
    examples = example.splitlines()
    heading = "Example:" if len(examples) == 1 else "Examples:"
    shown = "\n".join([heading, *(f"  {line}" for line in examples)])
    epilog = f"{_OVERRIDES_HELP}\n\n{shown}" if takes_overrides else shown
    parser = subparsers.add_parser(
        name,
        prog=f"titan-cpt {name}",
        help=summary,
        usage=f"titan-cpt {name} {usage}",
        description=textwrap.fill(f"{summary[0].upper()}{summary[1:]}. {details}", _HELP_WIDTH, break_on_hyphens=False),
        epilog=epilog,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=28),
        allow_abbrev=False,
    )
    parser.takes_overrides = takes_overrides
    parser.set_defaults(run=run, takes_overrides=takes_overrides, parser=parser, example=example)
    return parser


def add_config_option(parser: argparse.ArgumentParser) -> None:
    """The config as a positional FILE or as `--config FILE`; see `config_path`."""
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="the TOML file of the run")
    parser.add_argument("--config", type=Path, metavar="FILE", help="another way to give the TOML file")


def add_verbosity_options(parser: argparse.ArgumentParser) -> None:
    """`--quiet` and `--verbose`; see `verbosity`."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--quiet", action="store_true", help="print errors, warnings and results only")
    group.add_argument("--verbose", action="store_true", help="print more: settings that are not defaults, timings")


def add_dry_run_option(parser: argparse.ArgumentParser, what: str, *old_names: str) -> None:
    """`--dry-run`, which writes nothing.

    Args:
        what: what it prints.
        old_names: options of older versions that do the same; --help does not show them.
    """
    parser.add_argument("--dry-run", action="store_true", help=f"print {what}, and write nothing")
    for name in old_names:
        parser.add_argument(name, action="store_true", dest="dry_run", help=argparse.SUPPRESS)


def config_path(options: argparse.Namespace) -> Path:
    """The file of `add_config_option`.

    Raises:
        ConfigError: no file is given, or two different ones.
    """
    path = optional_config_path(options)
    if path is None:
        raise ConfigError(
            f"command line: the TOML file is missing; write `{options.parser.prog} FILE`. `titan-cpt init` writes one"
        )
    return path


def optional_config_path(options: argparse.Namespace) -> Path | None:
    """As `config_path`; None if no file is given."""
    positional: Path | None = options.file
    named: Path | None = options.config
    if positional and named and positional != named:
        raise ConfigError(f"command line: two files are given, {positional} and --config {named}; remove one")
    return positional or named


def add_inference_options(parser: argparse.ArgumentParser) -> None:
    """Options that say how a checkpoint is loaded and in which batches it computes; see `inference_options`."""
    group = parser.add_argument_group("how the checkpoint is loaded")
    group.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype in which the model computes (default: float32)",
    )
    group.add_argument(
        "--tokenizer",
        metavar="bytes|PATH",
        help="tokenizer to use (default: that of the run or of the imported model)",
    )
    group.add_argument(
        "--max-length",
        type=positive_int,
        metavar="TOKENS",
        help="maximum input length (default: the sequence length of the training)",
    )
    group.add_argument(
        "--batch-tokens",
        type=positive_int,
        default=8192,
        metavar="N",
        help="number of tokens per forward pass (default: 8192)",
    )
    group.add_argument(
        "--shard-weights", action="store_true", help="under torchrun: shard the weights over the ranks (FSDP)"
    )


def inference_options(options: argparse.Namespace) -> dict[str, Any]:
    """The values of `add_inference_options` as keyword arguments of `evaluation.inference`."""
    return {
        "precision": options.precision,
        "tokenizer": options.tokenizer,
        "max_length": options.max_length,
        "sharded": options.shard_weights,
        "batch_tokens": options.batch_tokens,
    }


def integer(text: str) -> int:
    """An integer."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None


def positive_int(text: str) -> int:
    """An integer, 1 or more."""
    return _number(text, int, "an integer of 1 or more", lambda number: number >= 1)


def step_list(text: str) -> tuple[int, ...]:
    """Comma-separated steps, each 0 or more."""
    allowed = "comma-separated steps of 0 or more, such as 1,100"
    return tuple(_number(part, int, allowed, lambda step: step >= 0, shown=text) for part in text.split(","))


def number_list(text: str) -> tuple[float, ...]:
    """Comma-separated numbers."""
    return tuple(
        _number(part, float, "comma-separated numbers, such as 0.7,0.3", isfinite, shown=text)
        for part in text.split(",")
    )


def number(text: str) -> float:
    """A number."""
    return _number(text, float, "a number", isfinite)


def token_count(text: str) -> int:
    """A token budget such as 10B."""
    from titan_cpt.common.numbers import parse_tokens

    try:
        tokens = parse_tokens(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return positive_int(str(tokens))


def learning_rate(text: str) -> float:
    """A learning rate, 0 or more."""
    return _number(text, float, "a learning rate of 0 or more, such as 3e-5", lambda lr: 0 <= lr < 1e9)


def temperature(text: str) -> float:
    """A sampling temperature, 0 or more."""
    return _number(text, float, "a temperature of 0 or more", lambda number: 0 <= number < 1e9)


def probability(text: str) -> float:
    """A probability above 0 and at most 1."""
    return _number(text, float, "above 0 and at most 1", lambda number: 0 < number <= 1)


def seconds(text: str) -> float:
    """A duration of at least a tenth of a second."""
    return _number(text, float, "a number of seconds from 0.1", lambda number: 0.1 <= number < 1e6)


def fraction(text: str) -> float:
    """A fraction from 0 and below 1."""
    return _number(text, float, "a fraction from 0 and below 1, such as 0.05", lambda number: 0 <= number < 1)


_Number = TypeVar("_Number", int, float)


def _number(
    text: str, kind: Callable[[str], _Number], allowed: str, is_allowed: Callable[[_Number], bool], shown: str = ""
) -> _Number:
    """Parse and check a number; argparse prints the message behind the option's name."""
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not is_allowed(number):
        raise argparse.ArgumentTypeError(f"must be {allowed}, got {shown or text!r}")
    return number


def parse_overrides(words: Sequence[str], parser: CommandParser | None = None) -> list[tuple[str, str]]:
    """(dotted key, value) pairs from `--a.b value` and `--a.b=value`.

    Args:
        parser: of the command; the message about an unknown option suggests one of its options.

    Raises:
        ConfigError: a word is neither of the two.
    """
    unknown, overrides = split_overrides(words)
    if unknown:
        raise ConfigError(_unknown_message(unknown[0], parser, "override a config key with --table.key value"))
    pairs = [word.removeprefix("--").partition("=") for word in overrides]
    return [(key, value) for key, _, value in pairs]


def refuse_unknown(words: Sequence[str], parser: CommandParser | None = None) -> list[tuple[str, str]]:
    """No overrides: this command takes none.

    Raises:
        ConfigError: there is a word that no option took.
    """
    if words:
        raise ConfigError(_unknown_message(words[0], parser, "--help lists what this command takes"))
    return []


def _unknown_message(word: str, parser: CommandParser | None, remedy: str) -> str:
    """That a word is unknown, with the options or config keys that it may stand for, or else the remedy."""
    from titan_cpt.common.text import did_you_mean

    name = word.partition("=")[0]
    if parser is None or not name.startswith("--") or "." in name:
        return f"command line: unknown argument {word!r}; {remedy}"
    suggestion = did_you_mean(name, parser.options())
    if not suggestion and parser.takes_overrides:
        from titan_cpt.config.schema_lookup import dotted_keys

        key = name.removeprefix("--").replace("-", "_")
        same = [f"--{dotted}" for dotted in dotted_keys() if dotted.rpartition(".")[2] == key]
        suggestion = f"; did you mean {' or '.join(same[:3])}?" if same else ""
    return f"command line: unknown argument {word!r}{suggestion or f'; {remedy}'}"
