"""Extend a tokenizer: continue the merges of a BPE on new text. The ids of the base and their texts do not change."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_cpt.common.files import require_writable, write_bytes_atomically
from titan_cpt.data.tokenizer.continue_bpe import Merge, continued_merges
from titan_cpt.data.tokenizer.extension import extension_of, library_tokenizer
from titan_cpt.data.tokenizer.special_tokens import BYTE_NAME, kind_of
from titan_cpt.data.tokenizer.tokenizer import BYTES, read_tokenizer
from titan_cpt.errors import DataError

_BOUNDARY = "\u2581"  # begins a word in vocabularies in the style of SentencePiece
_WORDS = re.compile(f"{_BOUNDARY}*[^{_BOUNDARY}\n]+|{_BOUNDARY}+|\n+")
_LONGEST = 64  # ids; languages without spaces have words as long as a paragraph, and each merge walks through a word
_CHECKED_WORDS = 20_000
_COVERAGE = 0.9995  # share of the characters written as bytes that become tokens, as in SentencePiece's trainer


@dataclass(frozen=True)
class Extended:
    """A new tokenizer.

    Attributes:
        content: of its tokenizer.json.
        characters: id -> character that the base writes as bytes and that is a token now; before the merges.
        merges: what was added besides, in order.
        tokens: the new tokens, as the vocabulary writes them, in the order of their ids.
        words: number of distinct words of the text.
    """

    content: bytes
    characters: dict[int, str]
    merges: list[Merge]
    tokens: list[str]
    words: int


class WordCounter:
    """Cuts texts into words as a tokenizer does before its merges, and counts them.

    Args:
        spec: content of a tokenizer.json with a BPE.
        library: its `tokenizers.Tokenizer`.
    """

    def __init__(self, spec: Mapping[str, Any], library: Any) -> None:
        self._normalizer, self._pre_tokenizer = library.normalizer, library.pre_tokenizer
        self._cuts_itself = spec.get("pre_tokenizer") is None
        added = [each for each in spec.get("added_tokens") or [] if not each.get("special")]
        self._raw = _any_of(each["content"] for each in added if not each.get("normalized"))
        self._normalized = _any_of(self._normalize(each["content"]) for each in added if each.get("normalized"))
        self.counts: Counter[str] = Counter()

    def add(self, text: str) -> None:
        """Count the words of a text. Added tokens in it, such as runs of spaces, are no words: merges never see them.

        Names of special tokens are text.
        """
        for raw in _between(self._raw, text):
            for part in _between(self._normalized, self._normalize(raw)):
                self._add(part)

    def _normalize(self, text: str) -> str:
        return text if self._normalizer is None else str(self._normalizer.normalize_str(text))

    def _add(self, normalized: str) -> None:
        if self._cuts_itself:  # the model sees a text as one word; no token may span several
            self.counts.update(_WORDS.findall(normalized))
            return
        for part, _ in self._pre_tokenizer.pre_tokenize_str(normalized):
            self.counts.update(_WORDS.findall(part) if _BOUNDARY in part[1:] else [part])


def _any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that matches the longest of several texts; None without any."""
    longest_first = sorted({text for text in texts if text}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _between(pattern: re.Pattern[str] | None, text: str) -> list[str]:
    """The parts of a text between the matches of a pattern, without empty ones."""
    return [part for part in ([text] if pattern is None else pattern.split(text)) if part]


def extend(
    base: str,
    texts: Iterable[str],
    add: int,
    output: Path,
    *,
    force: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> Extended:
    """Continue the merges of a tokenizer on texts, and write the result atomically as a tokenizer.json.

    Args:
        base: a tokenizer.json with a BPE, or the folder of one.
        texts: the new text.
        add: number of tokens to add.
        output: the file to write; the same tokenizer is left as it is.
        force: replace a different tokenizer.json.
        log: called with a line about each part of the work.

    Raises:
        DataError: the base is not a BPE, the `tokenizers` library is not installed, the texts yield fewer tokens, or
            the file exists and is another tokenizer (unless `force`) or not a tokenizer.
    """
    _require_replaceable(output, base, force=force)
    made = extended_tokenizer(base, texts, add, log=log)
    if not output.exists() or output.read_bytes() != made.content:
        if output.exists() and not force:
            raise _other_file(output, "the one made now differs from it")
        output.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(output, made.content)
    extension_of(base, str(output))
    return made


def extended_tokenizer(
    base: str, texts: Iterable[str], add: int, *, log: Callable[[str], None] = lambda line: None
) -> Extended:
    """See `extend`; writes nothing.

    Raises:
        DataError: see `extend`.
    """
    spec, numbers = require_bpe(base)
    library = library_tokenizer(spec, base)
    counts = _count_words(WordCounter(spec, library), texts, log)
    model = library.model
    split = {word: [piece.id for piece in model.tokenize(word)] for word in counts}
    plain = _mergeable(spec, numbers)
    first_id = max(numbers.values()) + 1
    characters = dict(enumerate(_characters_to_add(spec, numbers, counts)[:add], first_id))
    known = model
    if characters:
        log(f"{len(characters):,} characters that are several bytes to the base become tokens")
        vocab = {**spec["model"]["vocab"], **{character: number for number, character in characters.items()}}
        with_characters = _with_added_tokens({**spec, "model": {**spec["model"], "vocab": vocab}})
        known = library_tokenizer(with_characters, base).model

    def is_split_so(text: str, pieces: tuple[int, ...]) -> bool:
        return [piece.id for piece in model.tokenize(text)] == [*pieces]

    takes_whole_words = bool(spec["model"].get("ignore_merges"))
    begun = {word: [piece.id for piece in known.tokenize(word)] for word in counts} if characters else split
    merges = continued_merges(
        _short_words(begun, counts),
        {**plain, **characters},
        add - len(characters),
        first_id=first_id + len(characters),
        **({"accept": is_split_so} if takes_whole_words else {}),
    )
    found = len(characters) + len(merges)
    if found < add:
        fewer = f"add at most {found:,}, or " if found else ""
        raise DataError(
            f"{base}: the texts yield only {found:,} further tokens that occur twice, not {add:,}: {fewer}give "
            "more text"
        )
    content, tokens = _with_merges(spec, numbers, plain, characters, merges)
    made = Extended(content, characters, merges, tokens, len(counts))
    _check(made, [word for word, _ in counts.most_common(_CHECKED_WORDS)], split, base)
    return made


def _short_words(split: Mapping[str, list[int]], counts: Mapping[str, int]) -> Iterator[tuple[list[int], int]]:
    """The ids of each word and how often it occurs, in the order of the words; long words in several parts."""
    for word, count in sorted(counts.items()):
        ids = split[word]
        for start in range(0, len(ids), _LONGEST):
            yield ids[start : start + _LONGEST], count


def _count_words(counter: WordCounter, texts: Iterable[str], log: Callable[[str], None]) -> Counter[str]:
    size = 0
    for text in texts:
        counter.add(text)
        size += len(text.encode())
    log(f"{len(counter.counts):,} distinct words in {size:,} bytes of text")
    return counter.counts


def _mergeable(spec: Mapping[str, Any], numbers: Mapping[str, int]) -> dict[int, str]:
    """The tokens that a merge can have as a part, by id: not added tokens, the unknown token and names of bytes."""
    names = {token["content"] for token in spec.get("added_tokens") or []} | {spec["model"].get("unk_token")}
    return {number: token for token, number in numbers.items() if token not in names and not BYTE_NAME.fullmatch(token)}


def _characters_to_add(spec: Mapping[str, Any], numbers: Mapping[str, int], counts: Counter[str]) -> list[str]:
    """Characters of several bytes that the base does not have, most frequent first: no merge leads to them.

    Only vocabularies with byte fallback write them as bytes; others have every byte, or lose such characters.
    """
    if not spec["model"].get("byte_fallback"):
        return []
    missing: Counter[str] = Counter()
    for word, count in counts.items():
        for character in word:
            if character not in numbers and ord(character) > 0x7F:
                missing[character] += count
    most = sorted(missing, key=lambda character: (-missing[character], character))
    left = missing.total() * _COVERAGE
    chosen = []
    for character in most:
        if left <= 0 or missing[character] < 2:
            break
        chosen.append(character)
        left -= missing[character]
    return chosen


def _with_added_tokens(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The same tokenizer with its added tokens in the model's vocabulary.

    The library numbers added tokens that are not there after the vocabulary, whatever id the file gives them: in a
    longer vocabulary they would move.
    """
    vocab = {**spec["model"]["vocab"], **{each["content"]: each["id"] for each in spec.get("added_tokens") or []}}
    return {**spec, "model": {**spec["model"], "vocab": vocab}}


def require_bpe(base: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the content and the ids of a tokenizer whose merges can be continued.

    Raises:
        DataError: it cannot be read, or is not such a tokenizer.
    """
    if base == BYTES:
        raise DataError(
            f"{BYTES!r} has no merges to continue: name a tokenizer.json, or train one (`titan-cpt prepare`)"
        )
    spec, numbers = read_tokenizer(base)
    model = spec["model"]
    if kind_of(model) != "BPE":
        raise DataError(
            f"{base}: its model is {kind_of(model)}, which has no merges to continue; allowed is BPE, as in the "
            "tokenizers of GPT-NeoX, Llama, Qwen, Mistral and Gemma"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise DataError(f"{base}: its BPE has a {key} ({model[key]!r}), which is not supported")
    return spec, numbers


def _with_merges(
    spec: Mapping[str, Any],
    numbers: Mapping[str, int],
    plain: Mapping[int, str],
    characters: Mapping[int, str],
    merges: list[Merge],
) -> tuple[bytes, list[str]]:
    """The content of a tokenizer.json with further characters and merges, and the new tokens."""
    model = _with_added_tokens(spec)["model"]
    vocab = model["vocab"]
    assert vocab.keys() == numbers.keys(), "a vocabulary is the model's tokens and the added ones"
    written = {**plain, **characters}
    for merge in merges:
        written[merge.product] = written[merge.left] + written[merge.right]
    new = [(written[merge.left], written[merge.right]) for merge in merges]
    merged = [left + right for left, right in new]
    vocab |= {character: number for number, character in characters.items()}
    vocab |= {token: merge.product for token, merge in zip(merged, merges, strict=True)}
    tokens = [*characters.values(), *merged]
    old = model.get("merges") or []
    if all(isinstance(merge, str) for merge in old) and not any(" " in token for token in tokens):
        model["merges"] = [*old, *(f"{left} {right}" for left, right in new)]
    else:
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in old]
        model["merges"] = [*pairs, *(list(pair) for pair in new)]
    content = json.dumps({**spec, "model": model}, ensure_ascii=False, indent=2)
    return content.encode(), tokens


def _check(made: Extended, words: list[str], split: Mapping[str, list[int]], base: str) -> None:
    """Check that the library reads the result as it is meant: new ids split back into the base's."""
    model = library_tokenizer(json.loads(made.content), base).model
    old = library_tokenizer(require_bpe(base)[0], base).model
    pieces = {number: [piece.id for piece in old.tokenize(each)] for number, each in made.characters.items()}
    for merge in made.merges:
        pieces[merge.product] = [*pieces.get(merge.left, [merge.left]), *pieces.get(merge.right, [merge.right])]
    for word in words:
        ids = [number for piece in model.tokenize(word) for number in pieces.get(piece.id, [piece.id])]
        if ids != split[word]:
            raise DataError(
                f"{base}: cannot be extended: the `tokenizers` library splits {word!r} into other ids with the longer "
                "vocabulary, so the meaning of old ids would change"
            )


def _require_replaceable(output: Path, base: str, *, force: bool) -> None:
    if output.is_dir():
        raise DataError(f"{output}: is a folder; name the file to write, such as {output / 'tokenizer.json'}")
    base_file = Path(base) / "tokenizer.json" if Path(base).is_dir() else Path(base)
    if output.exists() and base_file.exists() and output.samefile(base_file):
        raise DataError(f"{output}: is the tokenizer that is extended; choose another output")
    require_writable(output)
    if not output.exists() or force:
        return
    try:
        extension_of(base, str(output))
    except DataError as fault:
        raise _other_file(output, str(fault)) from None


def _other_file(output: Path, difference: str) -> DataError:
    digest = hashlib.sha256(output.read_bytes()).hexdigest()[:12]
    return DataError(
        f"{output}: exists (SHA-256 {digest}) and is not replaced: {difference}. Choose another output, or replace it "
        "with --force; data and weights made with it could not be used any more"
    )
