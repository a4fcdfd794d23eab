"""A byte-level BPE from a tokenizer.json in tiktoken's terms: ranks, a pattern, and tokens that are matched before it.

tiktoken knows no merge list: it joins whichever neighbours make a known token, the lowest rank first. That equals the
merges of the file exactly if every token is made by the one pair of parts that its bytes fall into anyway, which is
proven here token by token. The proof rests on locality: as long as no merge crosses a border, what lies left of it and
what lies right of it are merged as if the other were not there. So a token (left, right) comes about if and only if
no earlier merge crosses from left into right; which pairs ever meet at that border is read off how the parts were made.
A token that no merge reaches is left out, because tiktoken would make it.
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
END = float("inf")  # behind every merge


class CannotConvertError(Exception):
    """The reason why tiktoken cannot give this file's tokens; whoever asked must use the `tokenizers` library."""


@dataclass(frozen=True)
class TiktokenSpec:
    """All that tiktoken needs, and what has to be done around it."""

    ranks: dict[bytes, int]
    """Bytes of a token to its place in the order of merging, from 0 without gaps."""
    ids: npt.NDArray[np.int64]
    """The vocabulary id of each rank."""
    pattern: str
    """Cuts text into the pieces that merges stay within."""
    nfc: bool
    """Whether text is put into Unicode normal form C first."""
    raw_tokens: dict[str, int | None]
    """Added tokens matched before normalising, to their id; None is a special token, which in a text stays text."""
    normal_tokens: dict[str, int | None]
    """The same, matched in normalised text."""


def to_tiktoken(spec: dict[str, Any]) -> TiktokenSpec:
    """Convert the content of a tokenizer.json.

    Raises:
        CannotConvertError: with the reason.
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
    if runs:  # several times faster than cutting the text up outside of tiktoken
        for length, number in runs.items():
            rank = ranks.setdefault(b" " * length, len(ids))
            ids[rank : rank + 1] = [number]
        pattern = _pattern_with_runs(runs)
    if runs or all(number is None for number in (raw | normal).values()):
        raw, normal = {}, {}
    return TiktokenSpec(ranks, np.array(ids, dtype=np.int64), pattern, nfc, raw, normal)


def token_bytes(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for.

    Raises:
        KeyError: a character is none of the 256 that stand for bytes.
    """
    return bytes(BYTE_OF[character] for character in token)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: visible Latin-1 is itself, the other bytes follow from U+0100 on, in order."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    return {chr(byte): byte for byte in visible} | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


BYTE_OF = _byte_alphabet()


def _check_model(model: dict[str, Any]) -> None:
    """Raise CannotConvertError unless the model is a plain BPE over bytes that loses none of them."""
    if model.get("type", "BPE") != "BPE":
        raise CannotConvertError(f"its model is {model['type']}, not BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise CannotConvertError(f"its model sets {key}")
    lost = [byte for character, byte in BYTE_OF.items() if character not in model["vocab"]]
    if lost := sorted(set(lost) - NEVER_IN_UTF8):
        raise CannotConvertError(f"its vocabulary lacks {len(lost)} bytes of UTF-8, which are dropped from texts")


def _is_nfc(normalizer: dict[str, Any] | None) -> bool:
    """Whether the normaliser is NFC; without one, or an empty sequence, it is not."""
    parts = _sequence(normalizer, "normalizers")
    if [part["type"] for part in parts] not in ([], ["NFC"]):
        raise CannotConvertError(f"its normalizer is {', '.join(part['type'] for part in parts)}, not NFC or none")
    return bool(parts)


def _pattern(pre_tokenizer: dict[str, Any]) -> str:
    """The regular expression by which a byte-level pre-tokenizer cuts."""
    parts = _sequence(pre_tokenizer, "pretokenizers")
    kinds = [part["type"] for part in parts]
    if not kinds or kinds[-1] != "ByteLevel" or parts[-1].get("add_prefix_space", True):
        raise CannotConvertError(f"its pre-tokenizer is {', '.join(kinds) or 'none'}, not ByteLevel as it stands")
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return GPT2_PATTERN
    if kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        split = parts[0]
        if split["behavior"] == "Isolated" and not split.get("invert") and "Regex" in split["pattern"]:
            return str(split["pattern"]["Regex"])
    raise CannotConvertError(f"its pre-tokenizer ({', '.join(kinds)}) is neither GPT-2's nor one Split and ByteLevel")


def _sequence(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The parts of a Sequence, or the one part that stands alone."""
    if not part:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _merge_pairs(merges: list[Any]) -> list[tuple[str, str]]:
    """Merges as pairs; the file has them as "left right" or as [left, right]."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in pairs]


def _token_order(vocab: dict[str, int], merges: list[tuple[str, str]], *, whole_pieces: bool) -> list[str]:
    """Tokens in the order in which tiktoken must prefer them, those that nothing reaches left out.

    With `whole_pieces` (`ignore_merges` in the file) a piece that is a token is that token even if no merge makes it:
    such tokens stay, behind all others, provided that tiktoken does not make them by merging either.
    """
    borders = _Borders([character for character in BYTE_OF if character in vocab], _grouped(merges))
    unmade = [token for token in vocab if token not in borders.made and not set(token) - BYTE_OF.keys()]
    order = list(borders.made) + (unmade if whole_pieces else [])
    for token in unmade if whole_pieces else []:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in borders.made and right in borders.made and borders.stay_apart(left, right, limit=END):
                raise CannotConvertError(f"its merges leave {left!r} and {right!r} apart, which tiktoken would join")
    return order


def _grouped(merges: Iterable[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """Token to the pairs that make it, in the order of merging; the pairs of one token must follow one another."""
    products: dict[str, list[tuple[str, str]]] = {}
    last = ""
    for left, right in merges:
        token = left + right
        if token != last and token in products:
            raise CannotConvertError(f"its merges make {token!r} at two places of their order")
        products.setdefault(token, []).append((left, right))
        last = token
    return products


class _Borders:
    """How tokens are made, and whether the border between two of them holds until both are whole."""

    def __init__(self, alphabet: list[str], products: dict[str, list[tuple[str, str]]]) -> None:
        self.made: dict[str, int] = dict.fromkeys(alphabet, -1)  # token -> rank of the merge that makes it
        self._split: dict[str, tuple[str, str]] = {}  # token -> the pair that makes it; no entry for a byte
        self._pair_rank = {pair: rank for rank, pairs in enumerate(products.values()) for pair in pairs}
        for rank, (token, pairs) in enumerate(products.items()):
            for left, right in pairs:
                if left in self.made and right in self.made and self.stay_apart(left, right, limit=rank):
                    self.made[token], self._split[token] = rank, (left, right)
                    break
        for pair, rank in self._pair_rank.items():
            if any(self.made.get(part, -1) >= rank for part in pair):
                raise CannotConvertError(f"its merges join {pair[0]!r} and {pair[1]!r} before making them")

    def stay_apart(self, left: str, right: str, *, limit: float) -> bool:
        """Whether no merge of a rank below `limit` crosses from left into right before both are whole.

        Walks back in time: of the two tokens at the border, the one made later gives way to its part at the border.
        At equal rank the leftmost merge goes first: a crossing one goes before one inside `right`, after one inside
        `left`.
        """
        crossing_first = False
        while True:
            rank = self._pair_rank.get((left, right), END)
            if rank < limit or (crossing_first and rank == limit):
                return False
            if self.made[left] > self.made[right]:
                limit, crossing_first = self.made[left], False
                left = self._split[left][1]
            elif right in self._split:
                limit, crossing_first = self.made[right], True
                right = self._split[right][0]
            else:
                return True


def _added_tokens(added: list[dict[str, Any]], *, nfc: bool) -> tuple[dict[str, int | None], dict[str, int | None]]:
    """Added tokens matched in text as it comes, and in normalised text; a special token has None in place of its id."""
    raw: dict[str, int | None] = {}
    normal: dict[str, int | None] = {}
    for token in added:
        content, special = token["content"], token.get("special", False)
        if not special and any(token.get(key) for key in ("single_word", "lstrip", "rstrip")):
            raise CannotConvertError(f"its added token {content!r} takes in its surroundings")
        if token.get("normalized", not special):
            normal[unicodedata.normalize("NFC", content) if nfc else content] = None if special else token["id"]
        else:
            raw[content] = None if special else token["id"]
    return raw, normal


def _space_runs(added: dict[str, int | None]) -> dict[int, int]:
    """Length of a run of spaces to its id, if the added tokens are nothing else (special ones aside), otherwise {}."""
    runs = {text: number for text, number in added.items() if number is not None}
    if any(len(text) < 2 or text.strip(" ") for text in runs):
        return {}
    shortest = min(runs, key=len, default="")
    if any(shortest in text for text, number in added.items() if number is None):
        return {}
    return {len(text): number for text, number in runs.items()}


def _pattern_with_runs(lengths: Iterable[int]) -> str:
    """GPT-2's pattern for text in which runs of spaces are tokens that are cut out first, the longest before others.

    White space then ends where a run begins, and what stands before a run stands at an end of text.
    """
    runs = "|".join(f" {{{length}}}" for length in sorted(lengths, reverse=True))
    space = f"(?:(?! {{{min(lengths)}}})\\s)"
    return f"{runs}|{GPT2_PATTERN.removesuffix(GPT2_SPACE)}{space}+(?!\\S)|{space}+"
