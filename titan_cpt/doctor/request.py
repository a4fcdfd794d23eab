"""The arguments of all checks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Request:
    """The config and the plan that the checks look at.

    Attributes:
        config: the TOML file; None: only the machine is checked.
        overrides: (dotted key, value) pairs of the command line.
        world_size: ranks of the plan; None: the fewest possible.
    """

    config: Path | None = None
    overrides: tuple[tuple[str, str], ...] = ()
    world_size: int | None = None

    def as_json(self) -> dict[str, Any]:
        """The attributes as JSON has them."""
        config = None if self.config is None else str(self.config)
        return {"config": config, "overrides": list(self.overrides), "world_size": self.world_size}

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> Request:
        """The request that `as_json` wrote."""
        config = None if table["config"] is None else Path(table["config"])
        return cls(config, tuple((key, value) for key, value in table["overrides"]), table["world_size"])
