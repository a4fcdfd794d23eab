"""A byte tokenizer, and tokenizers that extend it."""

import copy

from titan_cpt.data.tokenizer.ids_fingerprint import byte_tokenizer_json

MERGES = [("t", "h"), ("th", "e"), ("\u0120", "the")]  # \u0120: the space, as byte-level vocabularies write it


def base_spec():
    """The bytes and <|endoftext|>, 257 ids."""
    return byte_tokenizer_json(256)


def extended(spec, merges=MERGES, added=()):
    """The tokenizer with further merges, and with added tokens behind them."""
    new = copy.deepcopy(spec)
    vocab = new["model"]["vocab"]
    for token in new["added_tokens"]:
        vocab[token["content"]] = token["id"]  # otherwise the library would number it after the new tokens
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
        new["model"]["merges"].append([left, right])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    new["added_tokens"] += [{"id": len(vocab) + place, "content": each} | flags for place, each in enumerate(added)]
    return new
