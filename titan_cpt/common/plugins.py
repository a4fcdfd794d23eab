"""Plugins: dataset formats, model families and metrics that other installed packages register as entry points.

A package registers one in its pyproject.toml; docs/library.md describes what each group calls.

    [project.entry-points."titan_cpt.formats"]
    lines = "titan_lines:open_tokens"

A config selects a plugin by its name. A package that is only installed changes nothing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import Any

from titan_cpt.errors import ConfigError

FORMATS = "titan_cpt.formats"
FAMILIES = "titan_cpt.families"
METRICS = "titan_cpt.metrics"


@dataclass(frozen=True)
class Plugin:
    """One entry point of an installed package.

    Attributes:
        package: name of the distribution, as pip shows it.
        entry: the entry point.
    """

    package: str
    version: str
    entry: metadata.EntryPoint

    @property
    def origin(self) -> str:
        """Package and version."""
        return f"{self.package} {self.version}"

    def load(self) -> Any:
        """Import the module of the entry point and return the object that it names.

        Raises:
            ConfigError: the import fails, with its reason.
        """
        try:
            return self.entry.load()
        except (Exception, SystemExit) as error:  # a plugin's module may raise anything
            raise ConfigError(
                f"{self.entry.group}: {self.entry.name!r} of {self.origin} cannot be loaded from {self.entry.value}: "
                f"{type(error).__name__}: {error}. Repair or reinstall {self.package}"
            ) from error


def registered(group: str) -> dict[str, list[Plugin]]:
    """The plugins of a group by name, sorted; more than one of a name only if several packages register it."""
    return _registered(group, tuple(sys.path))


@lru_cache(maxsize=8)
def _registered(group: str, _path: tuple[str, ...]) -> dict[str, list[Plugin]]:
    found: dict[str, list[Plugin]] = {}
    for entry in sorted(metadata.entry_points(group=group), key=lambda entry: entry.name):
        package, version = (entry.dist.name, entry.dist.version) if entry.dist else ("an unknown package", "")
        found.setdefault(entry.name, []).append(Plugin(package, version, entry))
    return found


def find_plugin(group: str, name: str) -> Plugin:
    """The plugin of a name.

    Raises:
        ConfigError: no installed package registers the name, or several do.
    """
    plugins = registered(group).get(name, [])
    if not plugins:
        raise ConfigError(f"no installed package registers {name!r} under {group}; {what_is_registered(group)}")
    if len(plugins) > 1:
        origins = " and ".join(plugin.origin for plugin in plugins)
        raise ConfigError(f"{group}: {origins} both register {name!r}: uninstall one of them")
    return plugins[0]


def what_is_registered(group: str) -> str:
    """The names that installed packages register under a group, each with its package."""
    names = [f"{name!r} ({plugin.origin})" for name, plugins in registered(group).items() for plugin in plugins]
    return f"registered are {', '.join(names)}" if names else "no installed package registers one"
