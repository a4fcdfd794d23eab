"""A tokenizer that extends another one: the ids of the base keep their meaning, so its weights and token files fit.

Does not import torch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from titan_cpt.data.tokenizer.ids_fingerprint import with_same_ids
from titan_cpt.data.tokenizer.special_tokens import kind_of, merges_of, model_vocab
from titan_cpt.data.tokenizer.tokenizer import load_tokenizer, read_tokenizer
from titan_cpt.errors import DataError, how_to_install

_SHOWN = 3


@dataclass(frozen=True)
class Extension:
    """A tokenizer, and the one that it extends.

    Attributes:
        base: path of the extended tokenizer.
        path: path of the extension.
        base_vocab_size: B; ids in [0, B) are those of the base.
        vocab_size: V; ids in [B, V) are new.
        notes: why a text that has no new token in it may still be split otherwise than by the base.
    """

    base: str
    path: str
    base_vocab_size: int
    vocab_size: int
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def pieces(self) -> Mapping[int, tuple[int, ...]]:
        """The ids of the base that stand for the text of each new id, in order; empty if the base has none.

        Where the merges of the base are continued, these are the leaves of the merges that make a token: replacing
        every new id in an encoded text by its pieces gives the base's ids of this text.

        Raises:
            DataError: a token is not made by a merge, and the `tokenizers` library is not installed.
        """
        _, old = read_tokenizer(self.base)
        spec, numbers = read_tokenizer(self.path)
        made = {product: (left, right) for left, right, product in merges_of(spec["model"]) if product not in old}
        added = {token["content"] for token in spec.get("added_tokens") or []}
        found: dict[str, tuple[int, ...]] = {}
        for token in sorted((each for each in numbers if each not in old), key=numbers.__getitem__):
            if token in made and all(part in old or part in found for part in made[token]):
                left, right = ((old[part],) if part in old else found[part] for part in made[token])
                found[token] = left + right
            elif token in added:
                found[token] = tuple(load_tokenizer(self.base).encode(token))
            else:
                found[token] = tuple(self._split(token))
        return {numbers[token]: ids for token, ids in found.items()}

    def _split(self, token: str) -> list[int]:
        """The ids into which the base's model splits an entry of a vocabulary, which is normalized already."""
        return [piece.id for piece in self._base_model.tokenize(token)]  # ids of unknown characters included

    @functools.cached_property
    def _base_model(self) -> Any:
        return library_tokenizer(read_tokenizer(self.base)[0], self.base).model


def extension_of(base: str, path: str) -> Extension:
    """Check that one tokenizer extends another.

    Args:
        base: a tokenizer.json, or the folder of one.
        path: the same of the extension.

    Raises:
        DataError: a file cannot be read, an id of the base means another text in the extension, or nothing is new.
    """
    old_spec, old = read_tokenizer(base)
    new_spec, new = read_tokenizer(path)
    size, total = max(old.values()) + 1, max(new.values()) + 1
    if old == new:
        raise DataError(f"{path}: has the same {len(old):,} tokens as tokenizer.extend.base, {base}, and no new one")
    faults = [
        f"{token!r} has id {number:,} in the base and {_id_text(new.get(token))}"
        for token, number in old.items()
        if new.get(token) != number
    ]
    faults += [
        f"{token!r} is new and has id {number:,}, below the base's {size:,}"
        for token, number in new.items()
        if token not in old and number < size
    ]
    if faults:
        more = f" (and {len(faults) - _SHOWN:,} more)" if faults[_SHOWN:] else ""
        raise DataError(
            f"{path}: does not extend {base}: {'; '.join(faults[:_SHOWN])}{more}. An extension keeps every id of its "
            "base, so that weights and token files fit: `titan-cpt tokenizer extend` makes one"
        )
    return Extension(base, path, size, total, tuple(_differences(old_spec, new_spec)))


def library_tokenizer(spec: Mapping[str, Any], path: str) -> Any:
    """The `tokenizers.Tokenizer` of the content of a tokenizer.json, without dropout.

    Raises:
        DataError: the `tokenizers` library is not installed, or cannot read it.
    """
    try:
        import tokenizers
    except ImportError as fault:
        raise DataError(
            f"{path}: to split new tokens as its model does needs the `tokenizers` library ({fault}); "
            f"{how_to_install('tokenizers')}"
        ) from fault
    try:
        return tokenizers.Tokenizer.from_str(json.dumps({**spec, "model": {**spec["model"], "dropout": None}}))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as fault:  # the library raises Exception, and panics in Rust are none
        raise DataError(f"{path}: the `tokenizers` library cannot read it: {fault}") from fault


def _id_text(number: int | None) -> str:
    return "none here" if number is None else f"{number:,} here"


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What makes ids of a text differ that has none of the new tokens in it."""
    found = [
        f"its {part} is not that of the base"
        for part in ("normalizer", "pre_tokenizer")
        if with_same_ids(old.get(part)) != with_same_ids(new.get(part))
    ]
    if kind_of(old["model"]) != kind_of(new["model"]):
        found.append(f"its model is {kind_of(new['model'])}, that of the base {kind_of(old['model'])}")
    elif kind_of(old["model"]) == "BPE":
        before = list(merges_of(old["model"]))
        if list(merges_of(new["model"]))[: len(before)] != before:
            found.append("its merges do not begin with those of the base")
        elif any(
            product in model_vocab(old["model"]) for _, _, product in list(merges_of(new["model"]))[len(before) :]
        ):
            found.append("it has further merges that make tokens of the base")
    return found
