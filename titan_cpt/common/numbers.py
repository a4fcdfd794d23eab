"""Numbers with a suffix, as users write them: tokens ("300B"), steps ("12.5%") and bytes ("80GiB")."""

from __future__ import annotations

import re
from fractions import Fraction

from titan_cpt.errors import PlanError

_TOKEN_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_bytes(text: str) -> int:
    """Bytes from "80GiB", "40GB" or a plain number.

    Raises:
        PlanError: it is none of these.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(B|[KMGT]i?B)?", text.strip())
    if not match or float(match[1]) == 0:
        raise PlanError(f'--device-memory: must be a size such as "80GiB" or "40GB", got {text!r}')
    unit = match[2] or "B"
    base = 1024 if "i" in unit else 1000
    return int(float(match[1]) * base ** "BKMGT".index(unit[0]))


def parse_tokens(text: str) -> int:
    """The number of tokens that a string such as "300B", "2.5M" or "1_000_000" names; suffixes are powers of 1000.

    Raises:
        ValueError: not such a string, not a whole number of tokens, or none at all.
    """
    match = re.fullmatch(r"\s*(\d[\d_]*(?:\.\d+)?)\s*([KMBT]?)\s*", text)
    if match is None:
        raise ValueError(f'must be a number of tokens such as "300B", "2.5M" or "1_000_000", got {text!r}')
    tokens = Fraction(match[1].replace("_", "")) * _TOKEN_SUFFIXES[match[2]]
    if tokens.denominator != 1 or tokens >= 2**63:
        raise ValueError(f"must be a whole number of tokens below 2**63, got {text!r}")
    return int(tokens)


def parse_steps(text: str) -> Fraction:
    """The exact number that a string such as "1323.66 steps" names: an end point between two steps.

    Raises:
        ValueError: not such a string.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,1100})?) steps", text)
    if match is None:
        raise ValueError(f'must be a number of steps such as "1323.66 steps", got {text!r}')
    return Fraction(match[1])
