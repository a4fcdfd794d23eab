"""Train a byte-level BPE tokenizer on text, with gigatoken or the `tokenizers` library, which give the same file."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from titan_cpt.common.files import require_writable, write_bytes_atomically
from titan_cpt.data.tokenizer.bpe_merges import TextFile, gigatoken_merges
from titan_cpt.data.tokenizer.byte_level import CHARACTER_OF
from titan_cpt.data.tokenizer.tokenizer import END_OF_DOCUMENT, fingerprint_of, vocab_size_of
from titan_cpt.errors import DataError, how_to_install


def train_bpe(texts: Iterable[str], vocab_size: int, output: Path, *, force: bool = False) -> bool:
    """Train a byte-level BPE with GPT-2's pattern and write it atomically as a tokenizer.json.

    Args:
        texts: training texts.
        vocab_size: size of the vocabulary: 256 bytes, <|endoftext|> and the merges.
        output: the file to write.
        force: replace a different tokenizer.json.

    Returns:
        Whether the file was written; False if it already contains the same tokenizer.

    Raises:
        DataError: the `tokenizers` library is not installed, the texts yield fewer entries, or the file exists and is
            a different tokenizer (unless `force`) or not a tokenizer.
    """
    try:
        import tokenizers
    except ImportError as fault:
        raise DataError(
            f"training a tokenizer needs the `tokenizers` library ({fault}); {how_to_install('tokenizers')}"
        ) from fault
    if vocab_size < 257:
        raise DataError(f"{output}: a vocabulary of {vocab_size}; the minimum is 257 (256 bytes and {END_OF_DOCUMENT})")
    _require_replaceable(output, vocab_size, force=force)
    content = _trained_tokenizer(tokenizers, texts, vocab_size, output)
    if output.exists() and output.read_bytes() == content:
        return False
    if output.exists() and not force:
        raise _another_tokenizer(output, f"the one trained now is {hashlib.sha256(content).hexdigest()[:12]}")
    write_bytes_atomically(output, content)
    return True


def _trained_tokenizer(tokenizers: Any, texts: Iterable[str], vocab_size: int, output: Path) -> bytes:
    """Train the BPE and return its tokenizer.json; raises DataError if the texts yield fewer entries."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.NamedTemporaryFile(dir=output.parent, prefix=f".{output.name}.") as file:
            stored = TextFile(file)
            stored.write(texts)
            tokenizer = _trained(tokenizers, stored, vocab_size, alphabet=sorted(byte_level.alphabet()))
    except OSError as fault:
        if fault.filename is None:  # the system names no file when a write fails, such as on a full disk
            raise OSError(fault.errno, fault.strerror, str(output)) from fault
        raise
    if (size := tokenizer.get_vocab_size()) != vocab_size:
        raise DataError(
            f"{output}: the texts yield only {size} entries, not {vocab_size}: choose a vocabulary of at most {size}"
        )
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    serialized: str = tokenizer.to_str(pretty=True)
    return serialized.encode()


def _trained(tokenizers: Any, stored: TextFile, vocab_size: int, *, alphabet: list[str]) -> Any:
    """Train with gigatoken, or with the `tokenizers` library where their merges may differ."""
    merges = gigatoken_merges(stored, vocab_size - len(alphabet) - 1)
    if merges is None:
        return _library_training(tokenizers, stored.texts(), vocab_size)
    pairs = [(_characters(left), _characters(right)) for left, right in merges]
    entries = [END_OF_DOCUMENT, *alphabet, *map("".join, pairs)]
    vocab = {token: number for number, token in enumerate(entries)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, pairs))
    tokenizer.add_special_tokens([END_OF_DOCUMENT])
    return tokenizer


def _library_training(tokenizers: Any, texts: Iterable[str], vocab_size: int) -> Any:
    """Train with the `tokenizers` library."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _characters(token: bytes) -> str:
    return "".join(CHARACTER_OF[byte] for byte in token)


def _require_replaceable(output: Path, vocab_size: int, *, force: bool) -> None:
    """Refuse a file that is not a tokenizer.json, and, without `force`, one with another vocabulary size."""
    if output.is_dir():
        raise DataError(f"{output}: is a folder; name the file to write, such as {output / 'tokenizer.json'}")
    require_writable(output)
    if not output.exists():
        return
    try:
        entries = vocab_size_of(str(output))
    except DataError as fault:
        raise DataError(
            f"{output}: exists and is not a tokenizer, so it is not replaced; choose another --output, or rename or "
            f"remove it ({fault})"
        ) from None
    if entries != vocab_size and not force:
        raise _another_tokenizer(output, f"it has {entries:,} entries, not {vocab_size:,}")


def _another_tokenizer(output: Path, difference: str) -> DataError:
    return DataError(
        f"{output}: exists and is another tokenizer, fingerprint {fingerprint_of(str(output))[:12]}: {difference}. "
        "Data tokenized with it could not be used with the new one. Choose another --output, or replace it with --force"
    )
