"""Which tokenizer made some tokens: what `prepare` writes into PREFIX.json, found again when the tokens are used."""

import json
from pathlib import Path
from typing import NamedTuple

from titan_cpt.reading import read_text

HELD_OUT = "-validation"


class MadeBy(NamedTuple):
    """A tokenizer as PREFIX.json names it."""

    record: Path
    fingerprint: str
    vocab_size: int


def made_by(prefix: Path) -> MadeBy | None:
    """The tokenizer that a pair's record names; None where there is no record, or one that `prepare` did not write.

    A held-out PREFIX-validation has no record of its own: it is part of what PREFIX.json tells.

    Raises:
        AccessError: a record is there and the system does not let it be read.
    """
    whole = str(prefix).removesuffix(HELD_OUT)
    for name in dict.fromkeys((f"{prefix}.json", f"{whole}.json")):
        try:
            tokenizer = json.loads(read_text(Path(name)))["tokenizer"]
            return MadeBy(Path(name), str(tokenizer["fingerprint"]), int(tokenizer["vocab_size"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            continue
    return None
