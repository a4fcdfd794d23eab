"""Words of the command line as values: what argparse calls, with a message where a word is not one, and overrides."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from titan_cpt.errors import ConfigError


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return number


def steps(text: str) -> tuple[int, ...]:
    """Steps with commas between them, none negative."""
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError(f"steps are not negative, got {text}")
    return numbers


def tokens(text: str) -> int:
    """A token budget such as 10B."""
    from titan_cpt.common.numbers import parse_tokens

    try:
        tokens = parse_tokens(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return positive(str(tokens))


def learning_rate(text: str) -> float:
    """A learning rate, 0 or more."""
    lr = float(text)
    if not 0 <= lr < 1e9:
        raise argparse.ArgumentTypeError(f"must be a learning rate of 0 or more, got {text}")
    return lr


def temperature(text: str) -> float:
    """A temperature, 0 or more."""
    temperature = float(text)
    if not 0 <= temperature < 1e9:
        raise argparse.ArgumentTypeError(f"must be a temperature of 0 or more, got {text}")
    return temperature


def share(text: str) -> float:
    """A share above 0 and at most 1."""
    share = float(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return share


def overrides_in(words: Sequence[str]) -> list[tuple[str, str]]:
    """`--a.b value` and `--a.b=value` as pairs.

    Raises:
        ConfigError: a word that is neither.
    """
    pairs, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in key:
            raise ConfigError(
                f"command line: unknown argument {word!r}; a config key is overridden as --table.key value"
            )
        if not equals:
            if not rest:
                raise ConfigError(f"command line: {word} has no value; write {word} VALUE")
            value = rest.pop(0)
        pairs.append((key, value))
    return pairs


def none_left(words: Sequence[str]) -> list[tuple[str, str]]:
    """Refuse words that no option took.

    Raises:
        ConfigError: there is one.
    """
    if words:
        raise ConfigError(f"command line: unknown argument {words[0]!r}; --help lists what this command takes")
    return []
