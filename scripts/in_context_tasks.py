"""Two tasks that need nothing but copying from the context: finishing a line, and recalling a value by its key.

They need no language and no knowledge, so that a model that forgets how to use its context shows it here, whatever
language it is trained on. Elhady et al. 2025 (arXiv:2506.00288) saw this ability fall within the first steps of
training on a new language without English, while the loss on the new language looked the same. These tasks are ours,
not the paper's benchmark. scripts/fetch_benchmarks.py writes them; nothing is downloaded.

    copying   lines of three letters, twice in different orders, then the first two of a line: which letter follows?
    recall    lines of a letter and a digit, then one of the letters: which digit belongs to it?

All four choices are in the context, equally often and at the ends of lines, and the right one's line is random: neither
the frequency of the choices nor their distance tells it, and chance is 0.25.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator, Mapping
from typing import Any

SAMPLES = 2_000
CHOICES = 4
_FEWEST, _MOST = 4, 8  # lines of a prompt


def copying(seed: int = 0) -> Iterator[dict[str, Any]]:
    """{"context", "choices", "answer"}: 4 to 8 lines of three letters, twice, and then two letters of a line."""
    draws = random.Random(f"copying/{seed}")
    for _ in range(SAMPLES):
        count = draws.randint(_FEWEST, _MOST)
        letters = draws.sample(string.ascii_uppercase, 3 * count)
        lines = [letters[3 * number : 3 * number + 3] for number in range(count)]
        shown = [" ".join(line) for line in (*draws.sample(lines, count), *draws.sample(lines, count))]
        asked, *others = draws.sample(lines, CHOICES)
        context = "\n".join((*shown, " ".join(asked[:2])))
        yield _row(draws, context, asked[2], [line[2] for line in others])


def recall(seed: int = 0) -> Iterator[dict[str, Any]]:
    """{"context", "choices", "answer"}: 4 to 8 lines of a letter and a digit, all different, then a letter."""
    draws = random.Random(f"recall/{seed}")
    for _ in range(SAMPLES):
        count = draws.randint(_FEWEST, _MOST)
        keys, values = draws.sample(string.ascii_uppercase, count), draws.sample(string.digits, count)
        asked = draws.randrange(count)
        lines = "\n".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
        others = draws.sample(values[:asked] + values[asked + 1 :], CHOICES - 1)
        yield _row(draws, f"{lines}\n{keys[asked]}", values[asked], others)


def _row(draws: random.Random, context: str, right: str, others: list[str]) -> dict[str, Any]:
    choices = draws.sample([right, *others], CHOICES)
    return {"context": context, "choices": choices, "answer": choices.index(right)}


TASKS: Mapping[str, Callable[[], Iterator[dict[str, Any]]]] = {"copying": copying, "recall": recall}
