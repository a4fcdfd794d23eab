"""The table [sweep]: the combinations of values that it describes (sweep points), and a name for each of them.

Keys in [sweep] are combined as a Cartesian product. The lists in [sweep.zip] have equal length and are combined item by
item; these combinations are crossed with the other keys. `stages.german.lr.max = [...]` and
`"stages.german.lr.max" = [...]` mean the same. [sweep.fit] names the law that is fitted to the runs (`SweepFitConfig`).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from titan_cpt.config.types import Fraction01, Mixture, Name, NonNegativeFloat, PositiveFloat, Table, Tokens

ZIP = "zip"
FIT = "fit"
_SET_BY_THE_SWEEP = ("job.name", "job.output_dir")
_LONGEST_NAME = 120
_IN_NAMES = str.maketrans({'"': "", "*": "all"})  # of a pattern of weights, which a key may end with


class SweepFitConfig(Table):
    """[sweep.fit]: the law that `titan-cpt sweep` fits to the losses of its runs, and the value that it advises."""

    law: Literal["cmr", "d_cpt", "log_linear", "lr_curve"]
    """cmr: power law of the loss in the domain's share; d_cpt: in model size, tokens and share; log_linear: in the
    mixture; lr_curve: in the learning rates of every step."""
    objective: Mixture
    """Datasets whose loss is to be low (for cmr and d_cpt: the domain), or a table of datasets and weights."""
    limit: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """By how much the loss of a dataset may rise over its loss before the stage, in nats per token, such as
    { pile = 0.05 }. Unset: no limit."""
    stage: Name | None = None
    """The stage whose losses are fitted. Unset: the last one."""
    tokens: Tokens | None = None
    """Token budget that the advice of cmr and d_cpt is for; beyond the trained ones it is marked as extrapolated.
    Unset: that of the stage."""
    max_epochs: PositiveFloat | None = None
    """For log_linear: how often the advised mixture may repeat each dataset in the stage. Unset: no bound."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Confidence level of the intervals."""
    annealing_decay: Fraction01 = 0.999
    """For lr_curve: the decay per step of the annealing momentum (lambda of arXiv:2408.11029)."""

    @property
    def weights(self) -> dict[str, float]:
        """The datasets of the objective with their weights; 1 each where none are given."""
        return dict(self.objective) if isinstance(self.objective, dict) else dict.fromkeys(self.objective, 1.0)


def sweep_faults(table: Mapping[str, Any]) -> Iterator[str]:
    """Every fault of the table, as `sweep.KEY: message`."""
    crossed, zipped = _keys(table)
    for key, values in [*crossed, *zipped]:
        if "." not in key:
            yield f"sweep.{key}: must be a dotted key such as stages.german.lr.max"
        elif key in _SET_BY_THE_SWEEP:
            yield f"sweep.{key}: cannot be swept; the sweep names each run and its folder by the values that differ"
        if not isinstance(values, list) or not values:
            yield f"sweep.{key}: must be a non-empty list of values, got {values!r}"
        elif (key, values) in crossed and len({_text(value) for value in values}) < len(values):
            yield f"sweep.{key}: has a value twice, which would give two equal runs: {values!r}"
    lengths = {key: len(values) for key, values in zipped if isinstance(values, list)}
    if len(set(lengths.values())) > 1:
        yield f"sweep.zip: its lists are combined item by item and must have the same length, got {lengths}"
    elif len({_text(point) for point in _zipped_points(zipped)}) < len(_zipped_points(zipped)):
        yield "sweep.zip: has a combination twice, which would give two equal runs"
    names = [key for key, _ in [*crossed, *zipped]]
    for key in sorted({key for key in names if names.count(key) > 1}):
        yield f"sweep.{key}: is set twice; remove one"


def points(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """{dotted key: value} of every sweep run; the last key changes fastest. Requires a table without `sweep_faults`."""
    crossed, zipped = _keys(table)
    axes: list[list[dict[str, Any]]] = [[{key: value} for value in values] for key, values in crossed]
    if zipped:
        axes.append(_zipped_points(zipped))
    return [{key: value for part in parts for key, value in part.items()} for parts in itertools.product(*axes)]


def point_names(sweep_points: Sequence[Mapping[str, Any]]) -> list[str]:
    """A unique folder name for each point, from the values that differ, such as `fraction-0.05_seed-1`."""
    keys = list(sweep_points[0]) if sweep_points else []
    shown = {key: _shown([point[key] for point in sweep_points]) for key in keys}
    names: list[str] = []
    for index in range(len(sweep_points)):
        name = "_".join(f"{_short(key, keys).translate(_IN_NAMES)}-{shown[key][index]}" for key in keys)
        if len(name) > _LONGEST_NAME:
            name = f"arm-{index}"
        names.append(name if name not in names else f"{name}_{index}")
    return names


def _keys(table: Mapping[str, Any]) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """(key, values) of the crossed keys and of those in [sweep.zip], in the order of the file."""
    zipped = table.get(ZIP, {})
    crossed = {key: value for key, value in table.items() if key not in (ZIP, FIT)}
    return list(_flat(crossed)), list(_flat(zipped)) if isinstance(zipped, Mapping) else [(ZIP, zipped)]


def _flat(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, value


def _zipped_points(zipped: Sequence[tuple[str, Any]]) -> list[dict[str, Any]]:
    lists = [values for _, values in zipped if isinstance(values, list)]
    return [dict(zip([key for key, _ in zipped], item, strict=False)) for item in zip(*lists, strict=False)]


def _short(key: str, keys: Sequence[str]) -> str:
    """The shortest end of a dotted key that no other key ends with."""
    words = key.split(".")
    for count in range(1, len(words)):
        end = ".".join(words[-count:])
        if all(other == key or not f".{other}".endswith(f".{end}") for other in keys):
            return end
    return key


def _shown(values: Sequence[Any]) -> list[str]:
    """Each value as a part of a name; for tables, only the entries in which they differ."""
    leaves = [dict(_flat({"": value})) if isinstance(value, Mapping) else {"": value} for value in values]
    keys = dict.fromkeys(key for leaf in leaves for key in leaf)
    differing = [key for key in keys if len({_text(leaf.get(key)) for leaf in leaves}) > 1] or list(keys)
    words = [[_word(leaf[key]) for key in differing if key in leaf] for leaf in leaves]
    return ["-".join(each) or "none" for each in words]


def _word(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
    word = re.sub(r"[^A-Za-z0-9.]+", "-", text.replace("e-0", "e-")).strip("-.")
    return word or ("all" if text == "*" else "none")  # "*" is a pattern of all weights


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
