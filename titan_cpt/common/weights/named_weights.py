"""Which weights of a checkpoint a name means: `PATH` those that training continues with, `PATH@average` their average.

A checkpoint holds the tensors `model.<parameter>` and, if its stage keeps an average, `average.<parameter>` beside
them. This is the only module that knows both the suffix and the names of the tensors.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

MODEL = "model"
AVERAGE = "average"
AVERAGE_SUFFIX = f"@{AVERAGE}"


@dataclass(frozen=True)
class NamedWeights:
    """Weights in a folder; as text, the name that means them.

    Attributes:
        folder: a checkpoint, or a run, which stands for several.
        average: the average, instead of the weights that training continues with.
    """

    folder: Path
    average: bool = False

    def __str__(self) -> str:
        """The name of the folder, with the suffix of the average."""
        return f"{self.folder}{suffix_of(self.average)}"


def named_weights(name: str | Path | NamedWeights) -> NamedWeights:
    """The weights that a path means.

    `PATH@average` and `PATH/@average` mean the average in the folder PATH, unless there is a folder of the whole name.
    """
    if isinstance(name, NamedWeights):
        return name
    path = Path(name)
    if not path.name.endswith(AVERAGE_SUFFIX) or os.path.exists(path):
        return NamedWeights(path)
    stem = path.name.removesuffix(AVERAGE_SUFFIX)
    return NamedWeights(path.with_name(stem) if stem else path.parent, average=True)


def split_average(name: str) -> tuple[str, bool]:
    """The text before the suffix, and whether there is one: of a URL, `stage:NAME@average`, or `STAGE@STEPS@average`.

    A URL whose folder is called so itself is written with a slash at its end.
    """
    stem = name.removesuffix(AVERAGE_SUFFIX)
    return stem, stem != name


def suffix_of(average: bool) -> str:
    """The suffix that a name of these weights has."""
    return AVERAGE_SUFFIX if average else ""


def loaded_name(stored: str, *, average: bool) -> str | None:
    """The name under which a stored tensor is loaded; None for a tensor that is not.

    With `average`, the tensors of the average are loaded as those of the model, and the model's own are not.
    """
    if not average:
        return stored
    weights, dot, parameter = stored.partition(".")
    if weights == AVERAGE:
        return f"{MODEL}{dot}{parameter}"
    return None if weights == MODEL else stored


def stored_name(loaded: str, *, average: bool) -> str:
    """The inverse of `loaded_name`: the name of the stored tensor that is loaded under this name."""
    weights, dot, parameter = loaded.partition(".")
    return f"{AVERAGE}{dot}{parameter}" if average and weights == MODEL else loaded
