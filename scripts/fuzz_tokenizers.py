"""Compare the ids of `prepare` with those of the `tokenizers` library on random strings, for each kind of tokenizer.

    python scripts/fuzz_tokenizers.py --strings 100000
    python scripts/fuzz_tokenizers.py --strings 100000 --tokenizer gpt-neox-20b/tokenizer.json
    python scripts/fuzz_tokenizers.py --characters     # every character of Unicode between letters, digits and spaces

Without --tokenizer, it trains a tokenizer for each split pattern that gigatoken knows, with NFC and added tokens in
some. Strings are texts of the Python library, cut at random, mixed with white space, punctuation, scripts, emoji,
combining marks, names of special and added tokens, and random characters. Prints the first string with other ids and
exits with 1, or a line per tokenizer.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import random
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from byte_level_tokenizers import PATTERNS, save_tokenizer  # noqa: E402

from titan_cpt.data.tokenizer.tokenizer import load_tokenizer  # noqa: E402

ADDED = {
    "gpt2": [(" " * length, True) for length in range(24, 1, -1)],
    "llama3": [("<tool>", False), ("</tool>", False)],
    "qwen2": [("<|box_start|>", False), ("end", True), ("o\u0302\u0323", True)],
    "o200k": [("\n\n\n", True), ("a b", True)],
}
ADDED_NAMES = [name for some in ADDED.values() for name, _ in some]
NAMES = ["<|endoftext|>", "<|pad|>", "<|padding|>", "<|end", "</s>", *ADDED_NAMES]
SPACES = [" ", " ", " ", "  ", "   ", " " * 23, " " * 24, " " * 49, "\n", "\n\n", "\r\n", "\r", "\t", "\t\t"]
SPACES += ["\x0b", "\x0c", *"\u00a0\u1680\u2003\u2028\u2029\u202f\u3000\x1c\x1f\x85\u200b\ufeff"]
WORDS = ["it's", "WE'LL", "'s", "\u2019s", "'\u017f", "1", "12", "1234567", "\u0664\u0665", "\u00bd", "\u2167"]
WORDS += ["...", "--", "==", "Stra\u00dfe", "na\u00efve", "e\u0301", "\u0301", "o\u0323\u0302", "\u212b", ">\u0338"]
WORDS += ["\U0001f468\u200d\U0001f469", "\u4e2d\u6587\u3002", "\u65e5\u672c\u8a9e", "\ud55c\uad6d"]
WORDS += ["\u1112\u1161\u11ab", "\u0645\u0631\u062d\u0628\u0627", "\u0928\u092e\u0938\u094d\u0924\u0947"]
WORDS += ["\u0e20\u0e32\u0e29\u0e32", "\u01c5", "\u0130", "x" * 40, "ab" * 20]


def main() -> int:
    """Compare on every tokenizer; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strings", type=int, default=1000, help="random strings per tokenizer")
    parser.add_argument(
        "--tokenizer", type=Path, help="a byte-level tokenizer.json; default: one of each kind, trained now"
    )
    parser.add_argument("--characters", action="store_true", help="every character instead of random strings")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("gigatoken", "tokenizers")), end="; ")
    print(f"Python {sys.version.split()[0]}")
    corpus = [file.read_text(errors="replace") for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:80]]
    with tempfile.TemporaryDirectory() as folder:
        for name, path in tokenizers_of(options.tokenizer, Path(folder), corpus):
            texts = every_character() if options.characters else random_strings(options.strings, corpus, options.seed)
            if not compare(name, path, texts):
                return 1
    return 0


def tokenizers_of(given: Path | None, folder: Path, corpus: list[str]) -> Iterator[tuple[str, Path]]:
    """Yield name and path of the tokenizers."""
    if given is not None:
        yield given.name, given
        return
    for pattern in PATTERNS:
        path = folder / f"{pattern}.json"
        added = ADDED.get(pattern, ())
        save_tokenizer(path, pattern, texts=corpus, vocab_size=8000, nfc=pattern in ("gpt2", "qwen2"), added=added)
        yield pattern, path


def every_character() -> Iterator[str]:
    """Yield a text for each character."""
    for code in (*range(0xD800), *range(0xE000, 0x110000)):
        one = chr(code)
        yield f"a{one}a{one}{one}\u00e9 1{one}1 {one} !{one}!  {one}\n{one} A{one}b'S"


def random_strings(count: int, corpus: list[str], seed: int) -> Iterator[str]:
    """Yield strings of 1 to 24 parts."""
    draw = random.Random(seed)
    for _ in range(count):
        yield "".join(random_part(draw, corpus) for _ in range(draw.randint(1, 24)))


def random_part(draw: random.Random, corpus: list[str]) -> str:
    """A word, white space, a name, an excerpt of the corpus, or random characters."""
    kind = draw.random()
    if kind < 0.3:
        return draw.choice(SPACES)
    if kind < 0.5:
        return draw.choice(WORDS)
    if kind < 0.6:
        return draw.choice(NAMES)
    if kind < 0.85:
        text = draw.choice(corpus)
        start = draw.randrange(len(text)) if text else 0
        return text[start : start + draw.randint(1, 30)]
    largest = draw.choice((0x7F, 0x2FF, 0xD7FF, 0x1FFFF, 0x10FFFF))
    codes = (draw.randint(0, largest) for _ in range(draw.randint(1, 4)))
    return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)


def compare(name: str, path: Path, texts: Iterator[str]) -> bool:
    """Whether all ids are equal; prints the first difference or a summary."""
    ours = load_tokenizer(str(path))
    library = Tokenizer.from_file(str(path))
    library.encode_special_tokens = True
    strings = 0
    size = 0
    while batch := list(islice(texts, 1000)):
        for text, expected in zip(batch, library.encode_batch_fast(batch, add_special_tokens=False), strict=True):
            if ours.encode(text) != expected.ids:
                print(f"{name}: {text!r}\n  library: {expected.ids}\n  ours:    {ours.encode(text)}")
                return False
            size += len(text.encode())
        strings += len(batch)
    print(f"{name}: {strings:,} strings, {size / 1e6:.1f} MB, equal ids ({ours.note or 'gigatoken'})", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
