"""The argument parser of titan-cpt: each mistake is one ConfigError, and config keys can be overridden by name."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from titan_cpt.errors import ConfigError

_NOT_A_VALUE = ".toml"  # after an override without a value, such as --compile.enable mine.toml


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that raises ConfigError instead of printing its usage and exiting.

    Attributes:
        takes_overrides: the command accepts `--table.key VALUE`. `parse_known_args` takes these words out before it
            assigns the others, so that VALUE is not taken for a positional argument, and returns them as
            `--table.key=VALUE` with the words that it does not know.
    """

    takes_overrides = False

    def parse_known_args(  # type: ignore[override]  # the base class has overloads for other namespaces
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """The options, and the words that are none of them.

        Raises:
            ConfigError: an option is missing, or has a wrong value.
        """
        words = list(sys.argv[1:] if args is None else args)
        overrides: list[str] = []
        if self.takes_overrides:
            words, overrides = split_overrides(words)
        options, unknown = super().parse_known_args(words, namespace)
        return options, [*unknown, *overrides]

    def error(self, message: str) -> NoReturn:
        """Raise a ConfigError with argparse's message in our words."""
        where, _, what = message.removeprefix("argument ").partition(": ")
        if what.startswith("expected"):
            message = f"{where} {what.replace('expected', 'needs', 1).replace('argument', 'value')}"
        elif what.startswith("ignored explicit argument"):
            message = f"{where} takes no value"
        elif where == "the following arguments are required":
            message = f"{what} is missing"
        else:
            message = message.removeprefix("argument ")
        end = " " if message.endswith("?") else ". "
        raise ConfigError(f"command line: {message}{end}`{self.prog} --help` shows what is allowed")

    def options(self) -> Iterator[str]:
        """The names of its options, without the old names that --help does not show."""
        for action in self._actions:
            if action.help != argparse.SUPPRESS:
                yield from action.option_strings

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        from titan_cpt.common.text import did_you_mean

        known = [str(choice) for choice in action.choices]
        suggestion = did_you_mean(str(value), known)
        if isinstance(action, argparse._SubParsersAction):
            end = " " if suggestion else ". "
            if str(value).endswith(_NOT_A_VALUE):
                suggestion, end = f"; did you mean `{self.prog} train {value}`?", " "
            raise ConfigError(f"command line: unknown command {value!r}{suggestion}{end}Commands: {', '.join(known)}")
        listed = f"{known[0]} or {known[1]}" if len(known) == 2 else f"one of {', '.join(known)}"
        raise argparse.ArgumentError(action, f"must be {listed}, got {value!r}{suggestion}")


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that are no overrides, and the overrides as `--table.key=VALUE`.

    A boolean key needs no value: `--compile.enable` is `--compile.enable=true`.

    Raises:
        ConfigError: an override of another key has no value.
    """
    others: list[str] = []
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*others, word, *rest], overrides
        if not _is_override(word):
            others.append(word)
        elif "=" in word:
            overrides.append(word)
        elif rest and not rest[0].startswith("--") and not (rest[0].endswith(_NOT_A_VALUE) and _is_boolean(word)):
            overrides.append(f"{word}={rest.pop(0)}")
        elif _is_boolean(word):
            overrides.append(f"{word}=true")
        else:
            raise ConfigError(f"command line: {word} has no value; write {word} VALUE")
    return others, overrides


def _is_override(word: str) -> bool:
    return re.match(r"--[^=]*\.", word) is not None


def _is_boolean(word: str) -> bool:
    """Whether the schema has this key, and its value is true or false."""
    from titan_cpt.config.schema_lookup import field_of, keys_of, tables_at

    *tables, key = word.removeprefix("--").split(".")
    return any(key in keys_of(table) and field_of(table, key).annotation is bool for table in tables_at(tables))
