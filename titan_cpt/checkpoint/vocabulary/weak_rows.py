"""Find weak rows of the embedding and the head: rows that a token has, and that training never gave a value.

They are, in the order of this list, each row in the first kind that fits:

    non-finite     a value is NaN or infinite
    near zero      the L2 norm is below 1 % of the median
    never trained  the row is like those of ids that no token has
    equal          another token has the same row, bit for bit

Near zero. Weight decay shrinks the rows of tokens that the training text lacks. The tables of Land and Bartolo 2024
(arXiv:2405.05417) give norms of 0.593 +- 0.073 for Llama 3 8B and 0.176 +- 0.021 for Mistral 7B; rows that were never
trained have norms of 2e-21 and 0, and tokens below 5 % of the mean are those that the models cannot repeat. The
smallest rows of frequent tokens, such as the comma of Pythia 6.9B, have two thirds of the mean.

Never trained. Without decay such a row keeps its random initialization: in Pythia 6.9B a norm of 0.51 to 0.52, where
others have 1.17 +- 0.06. In a head or a tied embedding, all ids that never are a target are pushed to a common vector.
Both are what the rows of ids without a token (the padding of the vocabulary) went through, so these are the reference:
Land and Bartolo compare with the mean of such rows too. Here a row is like them if its distance from their mean is
within 4 standard deviations of their own distances, each measured from the mean of the others. No row is called never
trained if the references are fewer than 8, or if tokens do not differ from them clearly: at least a tenth of the tokens
must be 1.5 times as far away as the farthest row that counts as like them. In a random model none is.

The sign of values has no part in this: a row whose values are all negative is a row like any other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, uint8

from titan_cpt.checkpoint.vocabulary.vocabulary_rows import VocabularyRows

NON_FINITE = "non-finite"
NEAR_ZERO = "near zero"
NEVER_TRAINED = "never trained"
EQUAL = "equal"

_NEAR_ZERO = 0.01  # of the median norm
_FEWEST_REFERENCES = 8
_DEVIATIONS = 4.0
_CLEARLY_FARTHER = 1.5
_SHARE_FARTHER = 0.1
_ROUNDING = 1e-6  # of the largest norm: distances of rows that are equal up to rounding


@dataclass(frozen=True)
class WeakRows:
    """What was found in one weight.

    Attributes:
        by_kind: the ids of each kind, ascending; every id in one of them. Ids without a token are non-finite or absent.
        tokens: bool [rows]: whether a token has the id.
    """

    by_kind: Mapping[str, NDArray[np.int64]]
    tokens: NDArray[np.bool_]

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        """The ids of all kinds, ascending."""
        return np.sort(np.concatenate([np.empty(0, np.int64), *self.by_kind.values()]))

    @property
    def healthy(self) -> NDArray[np.bool_]:
        """Bool [rows]: rows of tokens that are not weak."""
        return self.tokens & ~np.isin(np.arange(len(self.tokens)), self.ids)

    def restricted(self, ids: NDArray[np.bool_]) -> WeakRows:
        """Only the weak rows of these ids, bool [rows or more]."""
        kept = {kind: each[ids[each]] for kind, each in self.by_kind.items()}
        return WeakRows({kind: each for kind, each in kept.items() if len(each)}, self.tokens)


def find_weak_rows(rows: VocabularyRows, token_ids: Iterable[int] | None) -> dict[str, WeakRows]:
    """Examine the rows of every vocabulary weight.

    Args:
        token_ids: ids that a token of the weights' tokenizer has; None if unknown: then all ids count as tokens.
    """
    tokens = np.ones(rows.count, bool)
    if token_ids is not None:
        known = np.fromiter(token_ids, np.int64)
        tokens[:] = False
        tokens[known[known < len(tokens)]] = True
    return {name: _find(rows, name, tokens) for name in rows.names}


@dataclass(frozen=True)
class _Statistics:
    """Of all rows of one weight.

    Attributes:
        finite: bool [rows].
        norms: float64 [rows], L2.
        distances: float64 [rows], from the mean of the reference rows.
        same: int64 [rows]: the first id with the same bits.
    """

    finite: NDArray[np.bool_]
    norms: NDArray[np.float64]
    distances: NDArray[np.float64]
    same: NDArray[np.int64]


def _find(rows: VocabularyRows, name: str, tokens: NDArray[np.bool_]) -> WeakRows:
    found = _statistics(rows, name, ~tokens)
    considered = tokens & found.finite
    kinds = {NON_FINITE: ~found.finite}
    norms = found.norms[considered]
    if norms.any():
        small = (found.norms < _NEAR_ZERO * np.median(norms)) | (found.norms == 0)
        kinds[NEAR_ZERO] = considered & small
        considered &= ~small
    kinds[NEVER_TRAINED] = considered & (_like_references(found, tokens) | np.isin(found.same, found.same[~tokens]))
    considered &= ~kinds[NEVER_TRAINED]
    firsts, counts = np.unique(found.same[considered], return_counts=True)
    kinds[EQUAL] = considered & np.isin(found.same, firsts[counts > 1])
    return WeakRows({kind: np.flatnonzero(mask) for kind, mask in kinds.items() if mask.any()}, tokens)


def _statistics(rows: VocabularyRows, name: str, references: NDArray[np.bool_]) -> _Statistics:
    center = _center(rows, name, references)
    count = len(references)
    finite, norms, distances = np.empty(count, bool), np.empty(count), np.empty(count)
    same = np.empty(count, np.int64)
    first_id: dict[bytes, int] = {}
    for where, block in rows.blocks(name):
        wide = block.double().numpy()
        with np.errstate(all="ignore"):  # NaN and infinite values
            squares = np.einsum("ij,ij->i", wide, wide)  # finite for all finite float32 values
            from_center = squares - 2 * (wide @ center) + center @ center
        finite[where] = np.isfinite(squares)
        norms[where] = np.sqrt(squares)
        distances[where] = np.sqrt(np.maximum(from_center, 0))
        for number, bits in enumerate(_bits(block), start=where.start):
            same[number] = first_id.setdefault(hashlib.blake2b(bits, digest_size=16).digest(), number)
    return _Statistics(finite, norms, distances, same)


def _center(rows: VocabularyRows, name: str, references: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The mean of the finite reference rows, float64 [width]; zeros if there are none."""
    total, count = np.zeros(rows.spec.width), 0
    for where, block in rows.blocks(name, references):
        chosen = block.double().numpy()[references[where]]
        chosen = chosen[np.isfinite(chosen).all(axis=1)]
        total += chosen.sum(axis=0)
        count += len(chosen)
    return total / max(count, 1)


def _like_references(found: _Statistics, tokens: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Bool [rows]: whether the distance from the mean of the references is like that of a reference from the others."""
    own = found.distances[~tokens & found.finite]
    none = np.zeros(len(tokens), bool)
    if len(own) < _FEWEST_REFERENCES or not (tokens & found.finite).any():
        return none
    own = own * len(own) / (len(own) - 1)
    reach = _DEVIATIONS * own.std() + _ROUNDING * found.norms[found.finite].max()
    far = np.quantile(found.distances[tokens & found.finite], 1 - _SHARE_FARTHER)
    return np.abs(found.distances - own.mean()) <= reach if far >= _CLEARLY_FARTHER * (own.mean() + reach) else none


def _bits(block: Tensor) -> NDArray[np.uint8]:
    bits: NDArray[np.uint8] = block.contiguous().view(uint8).numpy()
    return bits
