"""PREFIX.json beside a .bin/.idx pair: how `prepare` made it, and with which tokenizer."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from titan_cpt.common.reading import read_text

VALIDATION_SUFFIX = "-validation"


class TokenizerProvenance(NamedTuple):
    """A tokenizer as PREFIX.json names it."""

    record: Path
    fingerprint: str
    vocab_size: int
    add_bos: bool
    """Documents begin with the begin-of-document token; records without the key say no."""


def tokenizer_provenance(prefix: Path) -> TokenizerProvenance | None:
    """The tokenizer that a pair's record names; None where there is no record, or one that `prepare` did not write.

    A held-out PREFIX-validation has no record of its own: it is part of what PREFIX.json tells.

    Raises:
        AccessError: a record is there and the system does not let it be read.
    """
    whole = str(prefix).removesuffix(VALIDATION_SUFFIX)
    for name in dict.fromkeys((f"{prefix}.json", f"{whole}.json")):
        try:
            record = json.loads(read_text(Path(name)))
            tokenizer, add_bos = record["tokenizer"], record.get("add_bos", False) is True
            return TokenizerProvenance(Path(name), str(tokenizer["fingerprint"]), int(tokenizer["vocab_size"]), add_bos)
        except (FileNotFoundError, ValueError, KeyError, TypeError, OverflowError, AttributeError, RecursionError):
            continue
    return None


def record_path(prefix: Path) -> Path:
    """Where the record of a pair is stored."""
    return Path(f"{prefix}.json")


def read_record(path: Path) -> dict[str, Any] | None:
    """The record that `prepare` wrote to a file; None if there is no file, or `prepare` did not write it.

    Raises:
        AccessError: the file is there and the system does not let it be read.
    """
    try:
        record = json.loads(read_text(path))
        of_ours = (
            isinstance(record["version"], int)
            and isinstance(record["tokenizer"]["fingerprint"], str)
            and isinstance(record["tokenizer"]["vocab_size"], int)
            and isinstance(record["holdout"], int | float)
            and isinstance(record["inputs"], list)
            and isinstance(record["counts"]["tokens"], int)
            and isinstance(record["counts"]["held_out_tokens"], int)
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return record if of_ours else None
