"""A seeded permutation of range(size) that computes any position in O(1), without a shuffle index in memory.

A balanced Feistel network permutes the smallest power of four that is at least `size`. A position that leaves the range
is passed through the network again until it is inside (cycle walking; fewer than four passes on average).

Sources: Luby and Rackoff 1988; Black and Rogaway 2002, "Ciphers with arbitrary finite domains"; round function: the
finalizer of splitmix64 (Steele, Lea and Flood 2014).
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6  # four give a strong pseudo-random permutation; two more because small ranges have very short halves
_LARGEST = 2**62


def permuted(positions: NDArray[np.int64], size: int, key: str) -> NDArray[np.int64]:
    """Map positions through the permutation of range(size) that `key` selects.

    Args:
        positions: int64 [n], each in [0, size).
        size: number of permuted positions, 1 to 2**62.
        key: seed of the permutation, any text.

    Returns:
        int64 [n], each in [0, size); distinct positions have distinct images.

    Raises:
        ValueError: a position or the size is out of range.
    """
    if not 1 <= size <= _LARGEST:
        raise ValueError(f"size must be in [1, 2**62], got {size}")
    if positions.size and (positions.min() < 0 or positions.max() >= size):
        raise ValueError(f"positions must be in [0, {size}), got {positions.min()} to {positions.max()}")
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    round_keys = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest(), dtype="<u8")
    images = _network(positions.astype(np.uint64), half_bits, round_keys)
    while (outside := images >= np.uint64(size)).any():
        images[outside] = _network(images[outside], half_bits, round_keys)
    return images.astype(np.int64)


def _network(values: NDArray[np.uint64], half_bits: int, round_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    left: NDArray[np.uint64]
    right: NDArray[np.uint64]
    shift = np.uint64(half_bits)
    mask = np.uint64(2**half_bits - 1)
    left = values >> shift
    right = values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mixed(right + round_key) & mask)
    joined: NDArray[np.uint64] = (left << shift) | right
    return joined


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    values = values ^ (values >> np.uint64(31))
    return values
