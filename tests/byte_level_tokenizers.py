"""Byte-level BPE tokenizers with each split pattern that gigatoken knows, for tests and scripts/fuzz_tokenizers.py."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+SUFFIX"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*SUFFIX"
)
PATTERNS = {
    "gpt2": [],
    "llama3": [_LETTERS + r"\p{N}{1,3}" + _REST],
    "qwen2": [_LETTERS + r"\p{N}" + _REST],
    "cl100k": [_LETTERS + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"],
    "o200k": [
        _CASES.replace("SUFFIX", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?")
        + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "deepseek": [
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ],
}
CORPUS = [
    "def function(self, value):\n        return value + 1\n\n\nclass Thing:\n    pass\n",
    "Der Zug fährt über die Brücke. Größe: 1.234,50 €. Er sagt: „Schön!“ it's we'll they've 2024-01-02 1000000",
    "中文字符 日本語です 한국어 مرحبا שלום नमस्ते 😀👨‍👩‍👧 \t\ttabs\r\nlines\r\n\r\n the theme of the thesis then",
] * 3


def save_tokenizer(
    path: Path,
    pattern: str,
    *,
    texts: Iterable[str] = CORPUS,
    vocab_size: int = 700,
    nfc: bool = False,
    added: Iterable[tuple[str, bool]] = (),
) -> Tokenizer:
    """Train a tokenizer with a pattern of PATTERNS, save it and return the library's, which keeps names as text.

    Args:
        path: the tokenizer.json.
        pattern: name of the pattern.
        texts: what to train on.
        vocab_size: entries without the added tokens.
        nfc: whether it normalizes to form NFC.
        added: added tokens, and whether each is matched after normalization.
    """
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == "gpt2")
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in PATTERNS[pattern]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level]) if splits else byte_level
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=normalized) for token, normalized in added])
    tokenizer.save(str(path))
    library = Tokenizer.from_file(str(path))
    library.encode_special_tokens = True
    return library
