"""Numbers as users write them: tokens ("300B"), steps ("12.5 steps"), bytes ("80GiB"); evenly spaced indices."""

from __future__ import annotations

import re
from fractions import Fraction

from titan_cpt.errors import ConfigError

_TOKEN_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_bytes(text: str, *, option: str) -> int:
    """Bytes from "80GiB" (powers of 1024), "40GB" or "40G" (powers of 1000), "1.5 KiB" or a plain number.

    Args:
        option: the command-line option that the size was given with, for the message.

    Raises:
        ConfigError: it is none of these, or zero.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(I?)B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0 or (match[3] and not match[2]):
        raise ConfigError(f'{option}: must be a size in bytes such as "5GB" or "80GiB", got {text!r}')
    base = 1024 if match[3] else 1000
    exponent = " KMGT".index(match[2].upper() or " ")
    return int(Fraction(match[1]) * base**exponent)


def parse_tokens(text: str) -> int:
    """The number of tokens that a string such as "300B", "2.5M" or "1_000_000" names; suffixes are powers of 1000.

    Raises:
        ValueError: not such a string, not a whole number of tokens, or 2**63 or more.
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


def evenly_spaced(available: int, wanted: int) -> list[int]:
    """Indices of evenly spaced items: the middles of `wanted` equal parts; all indices where fewer are available."""
    count = min(available, wanted)
    return [(2 * part + 1) * available // (2 * count) for part in range(count)]
