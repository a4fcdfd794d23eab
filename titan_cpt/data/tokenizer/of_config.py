"""The tokenizer of a config, whose file may not exist yet, and the one that it extends. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from titan_cpt.config.schema import Config
from titan_cpt.data.tokenizer.extension import extension_of
from titan_cpt.data.tokenizer.tokenizer import BYTES, fingerprint_of, load_tokenizer, vocab_size_of


def vocab_size_of_config(config: Config) -> int | None:
    """The vocabulary size of tokenizer.path, or of the tokenizer that [tokenizer] will make; None if neither is known.

    Raises:
        DataError: a file is not a tokenizer.json, or tokenizer.path does not extend tokenizer.extend.base.
    """
    path, extend = config.tokenizer.path, config.tokenizer.extend
    if _exists(path):
        if config.tokenizer.add_bos:
            load_tokenizer(path).with_bos(True)
        is_checked = extend is not None and _exists(extend.base)
        return extension_of(extend.base, path).vocab_size if is_checked and extend else vocab_size_of(path)
    base = base_vocab_size(config)
    if extend is not None and extend.add is not None and base is not None:
        return base + extend.add
    return config.tokenizer.train.vocab_size if config.tokenizer.train else None


def base_vocab_size(config: Config) -> int | None:
    """The vocabulary size of tokenizer.extend.base: smaller ids keep their meaning; None if no tokenizer is extended.

    For a plan it is 1, the smallest possible one, while the file is missing; see `extension_notes`.

    Raises:
        DataError: the file is not a tokenizer.json.
    """
    extend = config.tokenizer.extend
    if extend is None:
        return None
    return vocab_size_of(extend.base) if _exists(extend.base) else 1


def require_extension(config: Config) -> None:
    """Check, before training, that tokenizer.path extends tokenizer.extend.base, if there is such a table.

    Raises:
        DataError: it does not, or a file is missing.
    """
    if config.tokenizer.extend is not None:
        extension_of(config.tokenizer.extend.base, config.tokenizer.path)


def extension_notes(config: Config) -> Iterator[str]:
    """What a plan says about [tokenizer.extend]: a missing base, or why a text may have other ids than the base gives.

    Raises:
        DataError: tokenizer.path does not extend tokenizer.extend.base, or one of both is no tokenizer.json.
    """
    path, extend = config.tokenizer.path, config.tokenizer.extend
    if extend is not None and not _exists(extend.base):
        yield (
            f"tokenizer.extend.base does not exist yet: {extend.base}; until then, the number of its ids is unknown, "
            "and the plan assumes the smallest possible one"
        )
    elif extend is not None and _exists(path):
        for note in extension_of(extend.base, path).notes:
            yield f"tokenizer.path: {note}, {extend.base}: texts without new tokens may get other ids than before"


def fingerprints_of_config(config: Config) -> tuple[str | None, str | None]:
    """The fingerprints of tokenizer.path, None if it does not exist yet, and of the base that it extends, if any.

    Raises:
        DataError: a file is not a tokenizer.json.
    """
    path, extend = config.tokenizer.path, config.tokenizer.extend
    base = extend.base if extend is not None and _exists(extend.base) else None
    return fingerprint_of(path) if _exists(path) else None, None if base is None else fingerprint_of(base)


def _exists(path: str) -> bool:
    return path == BYTES or Path(path).exists()
