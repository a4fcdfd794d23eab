"""What becomes of another project's config: our keys, and three lists in which every one of its keys appears once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan_cpt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ListedKeys:
    """What became of some keys: one entry of a list.

    Attributes:
        keys: keys of the other project's file, dotted; () for a remark that belongs to no key of the file.
        found: the values of these keys, as text; () if the file sets none of them.
        ours: dotted key -> value of the keys here that they became.
        text: why, or what to do; "" if the line says everything.
    """

    keys: tuple[str, ...]
    found: tuple[str, ...] = ()
    ours: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""


class Conversion:
    """Reads the keys of another project's file, and records what became of each of them.

    Attributes:
        project: the other project, and the version whose meaning of the keys is used.
        files: the files that were read.
        values: dotted key -> value of our config. Keys of the only stage begin with "stage.".
        converted: keys that have a counterpart here.
        unmatched: keys that have none, with what to do instead.
        decisions: keys and remarks that the user must check.
        same_architecture: whether the model that is described here is the same function as there.
    """

    def __init__(self, project: str, given: Mapping[str, Any], files: Sequence[Path] = ()) -> None:
        self.project = project
        self.files = tuple(files)
        self.values: dict[str, Any] = {}
        self.converted: list[ListedKeys] = []
        self.unmatched: list[ListedKeys] = []
        self.decisions: list[ListedKeys] = []
        self.same_architecture = True
        self._given = given
        self._listed: set[str] = set()

    @property
    def name(self) -> str:
        """A name for the run: that of the last file, without characters that a run's name cannot have."""
        stem = self.files[-1].stem if self.files else "converted"
        kept = "".join(char if char.isascii() and (char.isalnum() or char in "_-") else "-" for char in stem)
        return kept.strip("-_")[:100] or "converted"

    def has(self, key: str) -> bool:
        """Whether the file sets the key to a value other than null."""
        return self._given.get(key) is not None

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a key; `default` if it is not in the file, or null."""
        found = self._given.get(key)
        return default if found is None else found

    def number(self, key: str, default: float | None = None) -> Any:
        """The number of a key, an int if it is whole in the file.

        Raises:
            ConfigError: it is not a finite number.
        """
        found = self.value(key, default)
        number = _as_number(found)
        if found is not None and number is None:
            raise self._wrong(key, "a number", found)
        return number

    def whole(self, key: str, default: int | None = None) -> Any:
        """The whole number of a key, 0 or more.

        Raises:
            ConfigError: it is not one.
        """
        number = self.number(key, default)
        if number is not None and (number < 0 or number != int(number)):
            raise self._wrong(key, "a whole number, 0 or more", number)
        return None if number is None else int(number)

    def pair(self, key: str, default: tuple[float, float]) -> tuple[float, float]:
        """The two numbers of a key, such as AdamW's betas.

        Raises:
            ConfigError: it is not a list of two numbers.
        """
        found = self.value(key, default)
        numbers = [_as_number(each) for each in found] if isinstance(found, list | tuple) else []
        if len(numbers) != 2 or None in numbers:
            raise self._wrong(key, "a list of two numbers", found)
        first, second = (float(number) for number in numbers if number is not None)
        return first, second

    def flag(self, key: str, default: bool = False) -> bool:
        """Whether a key is true.

        Raises:
            ConfigError: it is neither true nor false.
        """
        found = self.value(key, default)
        if not isinstance(found, bool):
            raise self._wrong(key, "true or false", found)
        return found

    def text(self, key: str, default: str = "") -> str:
        """The text of a key.

        Raises:
            ConfigError: it is not a text.
        """
        found = self.value(key, default)
        if not isinstance(found, str):
            raise self._wrong(key, "a text", found)
        return found

    def set(self, ours: Mapping[str, Any] | str, value: Any = None, *, of: Sequence[str] = (), text: str = "") -> None:
        """Set keys of our config, and list the other project's keys that they come from as converted.

        Args:
            ours: our dotted key, or a table of our keys and values.
            value: the value of the key.
            of: the other project's keys; those that the file does not set have the project's defaults.
        """
        table = {ours: value} if isinstance(ours, str) else dict(ours)
        self.values |= table
        self.converted.append(self._finding(of, table, text or ("" if self._given_of(of) else "their default")))

    def same(self, key: str, ours: str, *, default: Any = None, whole: bool = False) -> None:
        """A key whose value is taken over as it is: a number, true or false, or a text.

        Args:
            default: what the other project uses if the key is not set. None: nothing is written then.
            whole: the value must be a whole number.
        """
        found = self.value(key, default)
        if found is None:
            return
        if whole or (default is not None and isinstance(default, int) and not isinstance(default, bool)):
            found = self.whole(key, default)
        elif isinstance(default, float):
            found = float(self.number(key, default))
        elif isinstance(default, bool):
            found = self.flag(key, default)
        elif isinstance(default, str):
            found = self.text(key, default)
        elif not isinstance(found, str | int | float | bool):
            raise self._wrong(key, "a single value", found)
        self.set(ours, found, of=[key])

    def no_counterpart(self, keys: str | Sequence[str], text: str) -> None:
        """List keys that have no counterpart, with what to do instead; nothing if the file does not set them."""
        given = self._given_of([keys] if isinstance(keys, str) else keys)
        if given:
            self.unmatched.append(self._finding(given, {}, text))

    def other_architecture(self, keys: str | Sequence[str], text: str) -> None:
        """A setting of an architecture that is not available here, also if it is the other project's default."""
        keys = [keys] if isinstance(keys, str) else keys
        self.same_architecture = False
        text = f"another architecture than here: {text}"
        if self._given_of(keys):
            self.no_counterpart(keys, text)
        else:
            self.remark(f"{', '.join(keys)} (their default): {text}.")

    def decide(self, text: str, ours: Mapping[str, Any] | None = None, *, of: Sequence[str]) -> None:
        """Set our keys, if there are any, and list the keys that they come from as a decision to check."""
        self.values |= ours or {}
        self.decisions.append(self._finding(self._given_of(of), ours or {}, text))

    def remark(self, text: str) -> None:
        """A decision that belongs to no key of the file."""
        self.decisions.append(ListedKeys(keys=(), text=text))

    def finish(self, advice: Mapping[str, str]) -> None:
        """List the keys that are left: settings that are off here too, and those without a counterpart.

        Args:
            advice: key, or the beginning of keys if it ends with "*", -> what to do instead.
        """
        rest: dict[str, list[str]] = {}
        for key in self._given:
            if key not in self._listed:
                known = advice.get(key) or next(
                    (text for name, text in advice.items() if name.endswith("*") and key.startswith(name[:-1])), ""
                )
                rest.setdefault(known, []).append(key)
        for text, keys in rest.items():
            self._list_rest(keys, text)

    def keys_below(self, table: str) -> list[str]:
        """Keys of the file that begin with `table.`."""
        return [key for key in self._given if key.startswith(f"{table}.")]

    def finish_below(self, table: str, text: str) -> None:
        """List the remaining keys of a table: off or not set, or without a counterpart."""
        self._list_rest([key for key in self.keys_below(table) if key not in self._listed], text)

    def _list_rest(self, keys: Sequence[str], advice: str) -> None:
        unset = [key for key in keys if self._given[key] is None]
        off = [key for key in keys if advice and (self._given[key] is False or self._given[key] in ("", [], {}))]
        used = [key for key in keys if key not in unset and key not in off]
        if unset:
            self.converted.append(self._finding(unset, {}, "not set"))
        if off:
            self.converted.append(self._finding(off, {}, "off, as here"))
        text = advice or f"not known as keys of {self.project}: look up what they do there"
        self.no_counterpart(used, text)

    def _finding(self, keys: Sequence[str], ours: Mapping[str, Any], text: str) -> ListedKeys:
        given = self._given_of(keys)
        twice = self._listed.intersection(given)
        assert not twice, f"listed twice: {twice}"
        self._listed.update(given)
        found = tuple(shown(self._given[key]) for key in given)
        return ListedKeys(keys=given or tuple(keys), found=found, ours=ours, text=text)

    def _given_of(self, keys: Sequence[str]) -> tuple[str, ...]:
        return tuple(key for key in keys if key in self._given)

    def _wrong(self, key: str, allowed: str, found: Any) -> ConfigError:
        where = ", ".join(map(str, self.files)) or self.project
        return ConfigError(f"{where}: {key}: must be {allowed}, got {shown(found)}; correct it in this file")


def shown(value: Any) -> str:
    """A value of another project's file in one line, shortened."""
    text = f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def flattened(table: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of nested tables; lists and empty tables are values.

    Raises:
        ValueError: two keys have the same dotted name.
    """
    flat: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        inner = flattened(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
        if twice := flat.keys() & inner.keys():
            raise ValueError(f"{min(twice)} is there twice")
        flat |= inner
    return flat


def _as_number(found: Any) -> int | float | None:
    if isinstance(found, str):
        try:
            found = float(found)  # YAML 1.1 reads 1e-4 as a text
        except ValueError:
            return None
        found = int(found) if math.isfinite(found) and found == int(found) else found
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return found
