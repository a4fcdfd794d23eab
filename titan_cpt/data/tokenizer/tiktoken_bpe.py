"""Convert the byte-level BPE of a tokenizer.json to tiktoken: ranks, a pattern, and added tokens matched before it.

tiktoken has no merge list: it merges any two neighbors that form a known token, the lowest rank first. This gives the
tokens of the file exactly if each token can only arise from one pair of parts, the pair into which its bytes are merged
anyway. `_token_order` proves that for each token. The proof uses locality: as long as no merge crosses a border, the
bytes to its left and to its right are merged independently. So the token (left, right) is made if and only if no
earlier merge crosses from left into right, and the pairs that meet at that border follow from how the parts were made.
A token that no merge produces is excluded, because tiktoken would produce it.
"""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

GPT2_SPACE = r"\s+(?!\S)|\s+"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + GPT2_SPACE
NEVER_IN_UTF8 = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))
END = float("inf")  # a rank after every merge


class CannotConvertError(Exception):
    """The reason why tiktoken cannot give the tokens of this file; the caller then uses the `tokenizers` library."""


@dataclass(frozen=True)
class TiktokenSpec:
    """A tokenizer in tiktoken's terms, and the steps to do before tiktoken encodes a text."""

    ranks: dict[bytes, int]
    """Bytes of each token -> its rank, from 0 without gaps; lower ranks are merged first."""
    ids: npt.NDArray[np.int64]
    """The vocabulary id of each rank."""
    pattern: str
    """Regular expression that splits text into pieces; no merge crosses pieces."""
    nfc: bool
    """Whether text is normalized to Unicode form NFC first."""
    raw_tokens: dict[str, int | None]
    """Added tokens matched before normalization -> id; None for a special token, whose name remains text."""
    normal_tokens: dict[str, int | None]
    """Added tokens matched after normalization, likewise."""


def to_tiktoken(spec: dict[str, Any]) -> TiktokenSpec:
    """Convert the content of a tokenizer.json to tiktoken.

    Raises:
        CannotConvertError: the conversion would not give the same ids; the message is the reason.
    """
    model = spec["model"]
    _check_model(model)
    nfc = _is_nfc(spec.get("normalizer"))
    pattern = _pattern(spec.get("pre_tokenizer") or {})
    vocab: dict[str, int] = model["vocab"]
    order = _token_order(vocab, _merge_pairs(model["merges"]), whole_pieces=bool(model.get("ignore_merges")))
    ranks = {token_bytes(token): rank for rank, token in enumerate(order)}
    ids = [vocab[token] for token in order]
    raw, normal = _added_tokens(spec.get("added_tokens") or [], nfc=nfc)
    runs = _space_runs(raw | normal) if pattern == GPT2_PATTERN else {}
    if runs:  # several times faster than splitting the text in Python
        for length, number in runs.items():
            rank = ranks.setdefault(b" " * length, len(ids))
            ids[rank : rank + 1] = [number]
        pattern = _pattern_with_runs(runs)
    if runs or all(number is None for number in (raw | normal).values()):
        raw = {}
        normal = {}
    return TiktokenSpec(ranks, np.array(ids, dtype=np.int64), pattern, nfc, raw, normal)


def token_bytes(token: str) -> bytes:
    """Return the bytes of a token of a byte-level vocabulary.

    Raises:
        KeyError: a character is not one of the 256 that represent bytes.
    """
    return bytes(BYTE_OF[character] for character in token)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable characters for bytes: visible Latin-1 for itself, characters from U+0100 on for the others."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    return {chr(byte): byte for byte in visible} | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


BYTE_OF = _byte_alphabet()


def _check_model(model: dict[str, Any]) -> None:
    """Raise CannotConvertError unless the model is a plain BPE over all bytes."""
    if model.get("type", "BPE") != "BPE":
        raise CannotConvertError(f"its model is {model['type']}, not BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise CannotConvertError(f"its model sets {key}")
    lost = [byte for character, byte in BYTE_OF.items() if character not in model["vocab"]]
    if lost := sorted(set(lost) - NEVER_IN_UTF8):
        raise CannotConvertError(f"its vocabulary lacks {len(lost)} bytes of UTF-8, which it drops from texts")


def _is_nfc(normalizer: dict[str, Any] | None) -> bool:
    """Whether the normalizer is NFC; False without a normalizer or for an empty sequence."""
    parts = _sequence(normalizer, "normalizers")
    if [part["type"] for part in parts] not in ([], ["NFC"]):
        raise CannotConvertError(f"its normalizer is {', '.join(part['type'] for part in parts)}, not NFC or none")
    return bool(parts)


def _pattern(pre_tokenizer: dict[str, Any]) -> str:
    """Return the regular expression of a byte-level pre-tokenizer."""
    parts = _sequence(pre_tokenizer, "pretokenizers")
    kinds = [part["type"] for part in parts]
    if not kinds or kinds[-1] != "ByteLevel" or parts[-1].get("add_prefix_space", True):
        raise CannotConvertError(
            f"its pre-tokenizer is {', '.join(kinds) or 'none'}, not ByteLevel without a prefix space"
        )
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return GPT2_PATTERN
    if kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        split = parts[0]
        if split["behavior"] == "Isolated" and not split.get("invert") and "Regex" in split["pattern"]:
            return str(split["pattern"]["Regex"])
    raise CannotConvertError(f"its pre-tokenizer ({', '.join(kinds)}) is neither GPT-2's nor one Split and ByteLevel")


def _sequence(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the parts of a Sequence, or a list of the single part."""
    if not part:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _merge_pairs(merges: list[Any]) -> list[tuple[str, str]]:
    """Return merges as pairs; the file writes them as "left right" or [left, right]."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in pairs]


def _token_order(vocab: dict[str, int], merges: list[tuple[str, str]], *, whole_pieces: bool) -> list[str]:
    """Return the tokens in tiktoken's order of preference, without those that no merge produces.

    With `whole_pieces` (`ignore_merges` in the file), a piece that is a token becomes that token even if no merge
    produces it. Such tokens are appended, provided that tiktoken does not produce them by merging.
    """
    borders = _Borders([character for character in BYTE_OF if character in vocab], _grouped(merges))
    unmade = [token for token in vocab if token not in borders.made and not set(token) - BYTE_OF.keys()]
    order = list(borders.made) + (unmade if whole_pieces else [])
    for token in unmade if whole_pieces else []:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in borders.made and right in borders.made and borders.stay_apart(left, right, limit=END):
                raise CannotConvertError(f"tiktoken would merge {left!r} and {right!r}, which its merges do not")
    return order


def _grouped(merges: Iterable[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """Map each token to the pairs that merge into it, in merge order; the pairs of a token must be consecutive."""
    products: dict[str, list[tuple[str, str]]] = {}
    last = ""
    for left, right in merges:
        token = left + right
        if token != last and token in products:
            raise CannotConvertError(f"its merges produce {token!r} at two positions of their order")
        products.setdefault(token, []).append((left, right))
        last = token
    return products


class _Borders:
    """How tokens are merged, and whether two neighbors stay separate until both are complete."""

    def __init__(self, alphabet: list[str], products: dict[str, list[tuple[str, str]]]) -> None:
        self.made: dict[str, int] = dict.fromkeys(alphabet, -1)  # token -> rank of the merge that produces it
        self._split: dict[str, tuple[str, str]] = {}  # token -> the pair merged into it; no entry for a byte
        self._pair_rank = {pair: rank for rank, pairs in enumerate(products.values()) for pair in pairs}
        for rank, (token, pairs) in enumerate(products.items()):
            for left, right in pairs:
                if left in self.made and right in self.made and self.stay_apart(left, right, limit=rank):
                    self.made[token] = rank
                    self._split[token] = (left, right)
                    break
        for pair, rank in self._pair_rank.items():
            if any(self.made.get(part, -1) >= rank for part in pair):
                raise CannotConvertError(f"its merges use {pair[0]!r} and {pair[1]!r} before they produce them")

    def stay_apart(self, left: str, right: str, *, limit: float) -> bool:
        """Whether no merge of a rank below `limit` crosses from left into right before both are complete.

        Goes back through the merges: of the two tokens at the border, the one that was merged later is replaced by its
        part at the border. At equal rank the leftmost merge is first, so a crossing merge comes before one inside
        `right` and after one inside `left`.
        """
        crossing_first = False
        while True:
            rank = self._pair_rank.get((left, right), END)
            if rank < limit or (crossing_first and rank == limit):
                return False
            if self.made[left] > self.made[right]:
                limit = self.made[left]
                crossing_first = False
                left = self._split[left][1]
            elif right in self._split:
                limit = self.made[right]
                crossing_first = True
                right = self._split[right][0]
            else:
                return True


def _added_tokens(added: list[dict[str, Any]], *, nfc: bool) -> tuple[dict[str, int | None], dict[str, int | None]]:
    """Return the added tokens matched before and after normalization -> id, None for special tokens."""
    raw: dict[str, int | None] = {}
    normal: dict[str, int | None] = {}
    for token in added:
        content = token["content"]
        special = token.get("special", False)
        if not special and any(token.get(key) for key in ("single_word", "lstrip", "rstrip")):
            raise CannotConvertError(f"its added token {content!r} sets single_word, lstrip or rstrip")
        if token.get("normalized", not special):
            normal[unicodedata.normalize("NFC", content) if nfc else content] = None if special else token["id"]
        else:
            raw[content] = None if special else token["id"]
    return raw, normal


def _space_runs(added: dict[str, int | None]) -> dict[int, int]:
    """Map lengths of runs of spaces to ids if all non-special added tokens are such runs, otherwise return {}."""
    runs = {text: number for text, number in added.items() if number is not None}
    if any(len(text) < 2 or text.strip(" ") for text in runs):
        return {}
    shortest = min(runs, key=len, default="")
    if any(shortest in text for text, number in added.items() if number is None):
        return {}
    return {len(text): number for text, number in runs.items()}


def _pattern_with_runs(lengths: Iterable[int]) -> str:
    """Return GPT-2's pattern, extended to match runs of spaces first, the longest before shorter ones.

    Other white space then ends where a run begins, and text before a run is matched as if at the end of the text.
    """
    runs = "|".join(f" {{{length}}}" for length in sorted(lengths, reverse=True))
    space = f"(?:(?! {{{min(lengths)}}})\\s)"
    return f"{runs}|{GPT2_PATTERN.removesuffix(GPT2_SPACE)}{space}+(?!\\S)|{space}+"
