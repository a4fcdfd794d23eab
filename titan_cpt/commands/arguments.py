"""Shared by the command parsers: types of option values, options of several commands, config overrides."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from titan_cpt.errors import ConfigError

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # no public name in argparse

CHECKPOINTS_HELP = "a checkpoint folder, or a run folder: the last checkpoint of each of its stages"
_OVERRIDES_HELP = "Override any config key by its dotted name: --training.seq_len 512 --stages.german.lr.max 1e-4"


def add_command(
    subparsers: Subparsers,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    *,
    takes_overrides: bool = False,
) -> argparse.ArgumentParser:
    """Add a command's parser.

    Args:
        run: the handler; takes the parsed options and returns the exit status.
        summary: one line: what the command does.
        takes_overrides: accept `--table.key VALUE` for every config key; they are passed as `options.overrides`.
    """
    epilog = _OVERRIDES_HELP if takes_overrides else None
    parser = subparsers.add_parser(name, help=summary, description=summary, epilog=epilog, allow_abbrev=False)
    parser.set_defaults(run=run, takes_overrides=takes_overrides)
    return parser


def add_config_option(parser: argparse.ArgumentParser) -> None:
    """`--config FILE`, required."""
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the run's TOML file")


def add_inference_options(parser: argparse.ArgumentParser) -> None:
    """Options that say how a checkpoint is loaded and in which batches it computes; see `inference_options`."""
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32", help="compute dtype (default: float32)"
    )
    parser.add_argument(
        "--tokenizer", metavar="bytes|PATH", help="default: the tokenizer of the run or of the imported model"
    )
    parser.add_argument(
        "--max-length", type=positive_int, metavar="TOKENS", help="maximum input length (default: as in training)"
    )
    parser.add_argument(
        "--batch-tokens", type=positive_int, default=8192, metavar="N", help="tokens per forward pass (default: 8192)"
    )
    parser.add_argument(
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


def positive_int(text: str) -> int:
    """An integer, 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return number


def step_list(text: str) -> tuple[int, ...]:
    """Comma-separated steps, each 0 or more."""
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError(f"steps must be 0 or more, got {text}")
    return numbers


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
    lr = float(text)
    if not 0 <= lr < 1e9:
        raise argparse.ArgumentTypeError(f"must be a learning rate of 0 or more, got {text}")
    return lr


def temperature(text: str) -> float:
    """A sampling temperature, 0 or more."""
    temperature = float(text)
    if not 0 <= temperature < 1e9:
        raise argparse.ArgumentTypeError(f"must be a temperature of 0 or more, got {text}")
    return temperature


def probability(text: str) -> float:
    """A probability above 0 and at most 1."""
    probability = float(text)
    if not 0 < probability <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return probability


def parse_overrides(words: Sequence[str]) -> list[tuple[str, str]]:
    """(dotted key, value) pairs from `--a.b value` and `--a.b=value`.

    Raises:
        ConfigError: a word is neither of the two.
    """
    pairs: list[tuple[str, str]] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in key:
            raise ConfigError(f"command line: unknown argument {word!r}; override a config key with --table.key value")
        if not equals:
            if not rest:
                raise ConfigError(f"command line: {word} has no value; write {word} VALUE")
            value = rest.pop(0)
        pairs.append((key, value))
    return pairs


def refuse_unknown(words: Sequence[str]) -> list[tuple[str, str]]:
    """No overrides: this command takes none.

    Raises:
        ConfigError: there is a word that no option took.
    """
    if words:
        raise ConfigError(f"command line: unknown argument {words[0]!r}; --help lists what this command takes")
    return []
