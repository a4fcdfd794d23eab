"""The method of a merge and its numbers: what each method needs, checked before a file is read. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from titan_cpt.common.text import problem_list, quoted_list
from titan_cpt.errors import ConfigError

METHODS = ("mean", "linear", "slerp", "ties", "task-arithmetic")
FROM_BASE = ("ties", "task-arithmetic")
"""Methods that merge task vectors: differences to the weights of a base model."""

_PAPER_DENSITY = 0.2  # Yadav et al. 2023, section 6: the top 20 % of each task vector
_FEWEST = {"mean": 2, "linear": 2, "slerp": 2, "ties": 1, "task-arithmetic": 1}  # inputs


@dataclass(frozen=True)
class MergeSettings:
    """A method and its numbers.

    Attributes:
        method: one of `METHODS`.
        weights: one for each input, as given; 1 for each if none were given.
        density: the share of each task vector that TIES keeps.
        scale: what the merged task vector is multiplied with.
    """

    method: str
    weights: tuple[float, ...]
    density: float = 1.0
    scale: float = 1.0

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights divided by their sum."""
        total = math.fsum(self.weights)
        return tuple(weight / total for weight in self.weights)

    def as_record(self) -> dict[str, object]:
        """The settings that the method uses, for the manifest."""
        record: dict[str, object] = {"method": self.method, "weights": list(self.weights)}
        if self.method in FROM_BASE:
            record["scale"] = self.scale
        if self.method == "ties":
            record["density"] = self.density
        return record

    def describe(self) -> str:
        """One line: the method and its numbers as they are used."""
        if self.method == "task-arithmetic":
            return f"task-arithmetic: weights {_numbers(self.weights)}, scale {self.scale:g}"
        equal = len(set(self.weights)) == 1
        used = "equal weights" if equal else f"weights {_numbers(self.shares)}"
        if not equal and math.fsum(self.weights) != 1:
            used += f" ({_numbers(self.weights)}, divided by their sum)"
        if self.method == "slerp":
            used += f", t = {self.shares[1]:g}"
        if self.method == "ties":
            used += f", density {self.density:g}, scale {self.scale:g}"
        return f"{self.method}: {used}"


def merge_settings(
    inputs: int,
    *,
    method: str | None = None,
    weights: Sequence[float] | None = None,
    has_base: bool = False,
    density: float | None = None,
    scale: float | None = None,
) -> MergeSettings:
    """Check the options of a merge.

    Args:
        inputs: number of models to merge, without the base.
        method: one of `METHODS`; None for "linear" if there are weights, else "mean".
        weights: one for each input; None for equal weights, or 1 for each task vector.
        has_base: whether a base model is given.
        density: of TIES; None for 0.2.
        scale: of the merged task vector; None for 1.

    Raises:
        ConfigError: lists every problem.
    """
    chosen = method or ("mean" if weights is None else "linear")
    problems = [
        *_problems(chosen, inputs, weights, has_base=has_base, density=density, scale=scale),
        *_wrong_weights(chosen, inputs, weights),
    ]
    if problems:
        raise ConfigError(f"merge: {problem_list(problems)}")
    return MergeSettings(
        chosen,
        tuple(map(float, weights)) if weights is not None else (1.0,) * inputs,
        density=_PAPER_DENSITY if density is None and chosen == "ties" else density or 1.0,
        scale=1.0 if scale is None else float(scale),
    )


def _problems(
    method: str,
    inputs: int,
    weights: Sequence[float] | None,
    *,
    has_base: bool,
    density: float | None,
    scale: float | None,
) -> Iterator[str]:
    if method not in METHODS:
        yield f"method: must be one of {quoted_list(METHODS)}, got {method!r}"
        return
    if method == "slerp" and inputs != 2:
        yield f"slerp takes two inputs, got {inputs}: merge the result with the next one, or use linear"
    elif inputs < _FEWEST[method]:
        yield f"{method} takes {_FEWEST[method]} inputs or more, got {inputs}"
    if method in FROM_BASE and not has_base:
        yield f"{method} needs base: the model that all inputs were trained from"
    if method not in FROM_BASE:
        for name, given in (("base", has_base), ("scale", scale is not None)):
            if given:
                yield f"{name}: goes with {' and '.join(FROM_BASE)}, not with {method}"
    if method != "ties" and density is not None:
        yield f"density: goes with ties, not with {method}"
    if density is not None and not 0 < density <= 1:
        yield f"density: must be above 0 and at most 1, got {density:g}"
    if scale is not None and not math.isfinite(scale):
        yield f"scale: must be a finite number, got {scale:g}"
    if method == "linear" and weights is None:
        yield "linear needs weights, one for each input; without weights use mean"
    if method == "mean" and weights is not None:
        yield "weights: mean weighs all inputs equally; use linear"


def _wrong_weights(method: str, inputs: int, weights: Sequence[float] | None) -> Iterator[str]:
    if weights is None:
        return
    if len(weights) != inputs:
        yield f"weights: needs one for each of the {inputs} inputs, got {len(weights)}: {_numbers(weights)}"
    elif not all(map(math.isfinite, weights)):
        yield f"weights: must be finite numbers, got {_numbers(weights)}"
    elif method in ("slerp", "ties") and min(weights) < 0:
        yield f"weights: {method} takes weights of 0 or more, got {_numbers(weights)}"
    elif method != "task-arithmetic" and math.fsum(weights) <= 0:
        yield f"weights: are divided by their sum, which must be above 0, got {_numbers(weights)}"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)
