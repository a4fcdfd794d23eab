"""Special tokens of a tokenizer.json: their names and ids, and changes that make their names in a text stay text.

A literal </s> in a text is text. The `tokenizers` library can skip matching special tokens, but its models still know
their names: a Unigram, WordLevel or WordPiece model has them in its vocabulary, a BPE may merge them, and with byte
fallback <0x0A> is the byte token of the newline. `keep_text_as_text` therefore renames these entries, so that no text
can match them.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from titan_cpt.errors import DataError

END_NAMES = (
    *("<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "</s>"),
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
"""Usual names, in order of preference. </s> and <s> come late: in Gemma's vocabulary, beside <eos> and <bos>, they are
HTML tags."""
BEGIN_NAMES = (
    *("<|begin_of_text|>", "<bos>", "<|bos|>", "<s>"),
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
)
OTHER_NAMES = ("<unk>", "<pad>", "<mask>", "[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "[BOS]", "[EOS]")
BYTE_NAME = re.compile("<0x[0-9A-F]{2}>")
BYTE_NAMES = tuple(f"<0x{byte:02X}>" for byte in range(256))


class GuardedSpec(NamedTuple):
    """The content of a tokenizer.json, changed so that no text becomes a special token."""

    spec: dict[str, Any]
    """Content to build the encoder from; the original if nothing had to be changed."""
    names: dict[str, int]
    """Name -> id of the special tokens; no text is encoded to these ids."""
    unknown_id: int | None
    """Id of the unknown token, or None."""
    byte_ids: tuple[int, ...]
    """Ids of <0x00> to <0xFF> if both byte fallback and their names in a text may give them, otherwise ()."""


class BosToken(NamedTuple):
    """The begin-of-document (BOS) token of a tokenizer, or several such tokens."""

    ids: tuple[int, ...]
    name: str
    added: bool
    """Whether the file's post-processor adds it to each text, as transformers does by default."""


def model_vocab(model: dict[str, Any]) -> dict[str, int]:
    """Return token -> id without added tokens; a Unigram model lists [token, score] in the order of ids."""
    vocab = model["vocab"]
    return vocab if isinstance(vocab, dict) else {entry[0]: number for number, entry in enumerate(vocab)}


def check_added_tokens(path: str, spec: dict[str, Any]) -> None:
    """Compare the ids of the added tokens with those that the `tokenizers` library assigns.

    The library ignores the ids in the file: an added token that is in the model's vocabulary has the id from there, and
    the others follow the vocabulary in order. transformers does the same when it loads an export.

    Raises:
        DataError: an id differs, or two tokens share one.
    """
    added = spec.get("added_tokens") or []
    known = model_vocab(spec["model"])
    following = len(spec["model"]["vocab"])
    numbered: dict[str, int] = {}
    faults = []
    for token in added:
        content = token["content"]
        if content not in numbered:
            numbered[content] = known.get(content, following)
            following += content not in known
        if not content or token["id"] != numbered[content]:
            expected = f"{numbered[content]} in the library" if content else "none in the library, because it is empty"
            faults.append(f"{content!r} has id {token['id']} in the file, but {expected}")
    numbers = {**known, **numbered}
    owners: dict[int, str] = {}
    for content, number in numbers.items() if len({*numbers.values()}) < len(numbers) else ():
        if owners.setdefault(number, content) != content:
            faults.append(f"{owners[number]!r} and {content!r} share id {number}")
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise DataError(
            f"{path}: the `tokenizers` library, which transformers uses, assigns other ids than the file: "
            f"{'; '.join(faults[:3])}{more}. Added tokens must follow the vocabulary without gaps, in the order of "
            "their ids: sort added_tokens by id and fill each gap with an unused token, such as <|unused0|>"
        )


def find_bos_token(spec: dict[str, Any], numbers: dict[str, int]) -> BosToken | None:
    """Return the begin-of-document token: the one that the post-processor adds, otherwise the first usual name.

    Args:
        spec: content of a tokenizer.json.
        numbers: token -> id, added tokens included.
    """
    for part in _post_processors(spec):
        ids, names = _before_text(part)
        if ids:
            return BosToken(ids, " ".join(names), added=True)
    name = usual_name(BEGIN_NAMES, spec, numbers)
    return None if name is None else BosToken((numbers[name],), name, added=False)


def usual_name(names: Iterable[str], spec: dict[str, Any], numbers: Mapping[str, int]) -> str | None:
    """Return the first name that the file declares special, otherwise the first that the vocabulary contains."""
    declared = {token["content"] for token in spec.get("added_tokens") or [] if token.get("special")}
    there = [name for name in names if name in numbers]
    return next((name for name in there if name in declared), there[0] if there else None)


def keep_text_as_text(spec: dict[str, Any], eod: str) -> GuardedSpec:
    """Rename the vocabulary entries that a special token's name would match, and drop the merges that produce it.

    Ids do not change. Names that no text can match are kept, so most byte-level BPEs are returned unchanged.

    Args:
        spec: content of a tokenizer.json.
        eod: name of the end-of-document token.
    """
    model = spec["model"]
    vocab = model_vocab(model)
    added = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
    declared = {token["content"] for token in spec.get("added_tokens") or [] if token.get("special")}
    merged = _products(model)
    usual = {*END_NAMES, *BEGIN_NAMES, *OTHER_NAMES} & vocab.keys() - merged - added.keys()
    unknown = _unknown(model)
    placed = {name for part in _post_processors(spec) for name in part.get("special_tokens") or {}}
    placed = {name for name in placed if name in vocab or name in added}
    special = {eod} | declared | usual | placed | ({unknown} if unknown in vocab else set())
    names = {name: added.get(name, vocab.get(name, -1)) for name in special}

    fallback = bool(model.get("byte_fallback"))
    may_have_bytes = kind_of(model) in ("BPE", "Unigram") and not is_byte_level(spec)
    bytes_known = may_have_bytes and vocab.keys() >= {*BYTE_NAMES}
    reachable = _reachable(model, merged)
    hidden = {name for name in names if name in vocab and reachable(name)}
    if bytes_known and not fallback:
        hidden |= {name for name in BYTE_NAMES if reachable(name)}
    unmerged = hidden | ({*BYTE_NAMES} & merged if bytes_known else set())
    return GuardedSpec(
        _hide(spec, hidden, unmerged) if hidden | unmerged else spec,
        names,
        vocab.get(unknown) if unknown is not None else None,
        tuple(vocab[name] for name in BYTE_NAMES) if bytes_known and fallback and reachable(BYTE_NAMES[0]) else (),
    )


def without_byte_fallback(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the same model without byte fallback, and with byte tokens that no text can match."""
    hidden = _hide(spec, {*BYTE_NAMES}, {*BYTE_NAMES})
    return {**hidden, "model": {**hidden["model"], "byte_fallback": False}}


def kind_of(model: dict[str, Any]) -> str:
    """Return the type of the model, which old files omit."""
    if model.get("type"):
        return str(model["type"])
    if isinstance(model["vocab"], list):
        return "Unigram"
    return "BPE" if "merges" in model else "WordPiece" if "continuing_subword_prefix" in model else "WordLevel"


def is_byte_level(spec: dict[str, Any]) -> bool:
    """Whether the vocabulary uses the 256 characters that represent bytes."""
    return "ByteLevel" in json.dumps(spec.get("pre_tokenizer"))


def literals(names: Iterable[str]) -> Iterator[str]:
    """Yield texts that contain the names of special tokens."""
    for name in names:
        yield from (name, f"a {name} b", f"a{name}b", f"{name}{name}")


def _post_processors(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of the post-processor that may add tokens."""
    whole = spec.get("post_processor") or {}
    parts = whole["processors"] if whole.get("type") == "Sequence" else [whole]
    return [part for part in parts if part.get("type") in ("TemplateProcessing", "RobertaProcessing", "BertProcessing")]


def _before_text(part: dict[str, Any]) -> tuple[tuple[int, ...], list[str]]:
    """Return ids and names of the tokens that a post-processor adds before a single text."""
    if part["type"] != "TemplateProcessing":
        name, number = part["cls"]
        return (int(number),), [str(name)]
    ids: list[int] = []
    names: list[str] = []
    for item in part["single"]:
        if "Sequence" in item:
            break
        names.append(str(item["SpecialToken"]["id"]))
        ids += part["special_tokens"][names[-1]]["ids"]
    return tuple(ids), names


def _unknown(model: dict[str, Any]) -> str | None:
    """Return the name of the unknown token; a Unigram model has its index in the vocabulary."""
    if kind_of(model) == "Unigram":
        place = model.get("unk_id")
        return None if place is None else str(model["vocab"][place][0])
    return model.get("unk_token")


def merges_of(model: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield (left, right, product) of each merge of a BPE, in order."""
    prefix = len(model.get("continuing_subword_prefix") or "")
    for merge in model.get("merges") or []:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        yield left, right, left + right[prefix:]


def _products(model: dict[str, Any]) -> set[str]:
    """Return the tokens that merges of a BPE produce."""
    merges = model.get("merges") or []
    if model.get("continuing_subword_prefix") or not all(isinstance(merge, str) for merge in merges):
        return {product for _, _, product in merges_of(model)}
    return {merge.replace(" ", "", 1) for merge in merges}  # several times as fast for the usual form of a file


def _reachable(model: dict[str, Any], merged: set[str]) -> Any:
    """Return a predicate: can a text match this vocabulary entry? Always, unless a BPE has no merge for it."""
    if kind_of(model) != "BPE" or model.get("ignore_merges"):
        return lambda name: True
    return lambda name: name in merged or len(name) == 1


def _hide(spec: dict[str, Any], hidden: set[str], unmerged: set[str]) -> dict[str, Any]:
    """Return a copy with the hidden names renamed, and without merges that produce or use an unmerged name."""
    other = {name: f"\ufdd0{hashlib.sha256(name.encode()).hexdigest()}\ufdd0" for name in hidden}
    model = dict(spec["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {other.get(token, token): number for token, number in model["vocab"].items()}
    else:
        model["vocab"] = [[other.get(token, token), score] for token, score in model["vocab"]]
    if model.get("merges"):
        triples = zip(model["merges"], merges_of(model), strict=True)
        model["merges"] = [merge for merge, parts in triples if not unmerged & {*parts}]
    if model.get("unk_token") in other:
        model["unk_token"] = other[model["unk_token"]]
    added = spec.get("added_tokens") or []
    renamed = [{**token, "content": other.get(token["content"], token["content"])} for token in added]
    # The library must still match the names: a special token hides other added tokens inside its name.
    last = max([*model_vocab(model).values(), *(token["id"] for token in added)], default=-1)
    names = [token for token in added if token["content"] in other and token.get("special")]
    extra = [{**token, "id": last + place} for place, token in enumerate(names, 1)]
    return {**spec, "model": model, "added_tokens": [*renamed, *extra]}
