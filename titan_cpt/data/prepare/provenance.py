"""PREFIX.json, the record that `prepare` writes beside a .bin/.idx pair: inputs, options, tokenizer and counts."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from titan_cpt.common.reading import read_text
from titan_cpt.object_storage.filesystem import read_object
from titan_cpt.object_storage.locations import Location, is_url

VALIDATION_SUFFIX = "-validation"


class TokenizerProvenance(NamedTuple):
    """The tokenizer of a pair, from its record."""

    record: str
    fingerprint: str
    vocab_size: int
    add_bos: bool
    """Whether documents begin with the begin-of-document token; False if the record lacks the key."""


def tokenizer_provenance(prefix: Location) -> TokenizerProvenance | None:
    """Return the tokenizer in a pair's record; None without a record, or if `prepare` did not write it.

    PREFIX-validation has no record of its own: PREFIX.json describes both.

    Raises:
        AccessError: a record exists but cannot be read.
        RemoteError: object storage cannot be read.
    """
    base = str(prefix).removesuffix(VALIDATION_SUFFIX)
    for name in dict.fromkeys((f"{prefix}.json", f"{base}.json")):
        try:
            record = json.loads(_text_of(name))
            tokenizer = record["tokenizer"]
            add_bos = record.get("add_bos", False) is True
            return TokenizerProvenance(name, str(tokenizer["fingerprint"]), int(tokenizer["vocab_size"]), add_bos)
        except (FileNotFoundError, ValueError, KeyError, TypeError, OverflowError, AttributeError, RecursionError):
            continue
    return None


def _text_of(name: str) -> str:
    """The text of a record, local or in object storage; raises FileNotFoundError."""
    if not is_url(name):
        return read_text(Path(name))
    content = read_object(name)
    if content is None:
        raise FileNotFoundError(name)
    return content.decode()


def record_path(prefix: Path) -> Path:
    """Return the path of the record of a pair."""
    return Path(f"{prefix}.json")


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the record in a file; None if the file does not exist, or `prepare` did not write it.

    Raises:
        AccessError: the file exists but cannot be read.
    """
    try:
        record = json.loads(read_text(path))
        is_record = (
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
    return record if is_record else None
