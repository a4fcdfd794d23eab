"""Extend a tokenizer on the text of files: what `[tokenizer.extend]` and `titan-cpt tokenizer extend` do."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from titan_cpt.common.files import same_file
from titan_cpt.data.prepare.chunks import iterate_texts
from titan_cpt.data.prepare.text_inputs import find_inputs
from titan_cpt.data.tokenizer.extend import Extended, extend
from titan_cpt.errors import DataError

SAMPLE_BYTES = 1 << 28
"""Default size of the sample that stands for a longer text; merges hardly change with more."""


def extend_on_files(
    base: str,
    inputs: Sequence[str],
    add: int,
    output: Path,
    *,
    text_field: str = "text",
    max_bytes: int = SAMPLE_BYTES,
    force: bool = False,
    log: Callable[[str], None],
) -> Extended:
    """Continue the merges of a tokenizer on text files; see `extend`.

    Raises:
        DataError: see `find_inputs` and `extend`; or the output is one of the inputs.
    """
    overwritten = same_file(output, (Path(source.spec) for source in find_inputs(inputs) if not source.is_hub))
    if overwritten is not None:
        raise DataError(f"{overwritten}: is an input that the tokenizer would overwrite: choose another output")
    return extend(base, sampled_texts(inputs, text_field, max_bytes, log), add, output, force=force, log=log)


def sampled_texts(inputs: Sequence[str], text_field: str, max_bytes: int, log: Callable[[str], None]) -> Iterator[str]:
    """Yield the documents of text files: all of them, or an even sample where there is more text than `max_bytes`.

    A document is in the sample or not by its own text, so the sample does not depend on the order of the files.

    Raises:
        DataError: see `iterate_texts`.
    """
    total = sum(source.disk_bytes for source in find_inputs(inputs))
    share = min(1.0, max_bytes / max(1, total))
    if share < 1:
        log(f"reads an even sample, {share:.1%} of the documents: there is more text than {max_bytes:,} bytes")
    size = 0
    for text in iterate_texts(inputs, text_field):
        content = text.encode(errors="replace")
        if share < 1 and int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >= share * 2**64:
            continue
        size += len(content)
        if size > 2 * max_bytes:  # compressed files, and the hub, whose sizes are not known before
            log(f"reading ends after {size:,} bytes of text: raise --max-bytes to read more")
            return
        yield text
