"""Compare `titan-cpt prepare` with GPT-NeoX's way of preprocessing (`tokenizers` library), at identical output.

    python scripts/bench/prepare.py --input english.jsonl --tokenizer gpt-neox-20b/tokenizer.json [--turns 3]

Both read a JSONL file with a field `text`, tokenize in --workers processes and write .bin and .idx, which must be
equal. GPT-NeoX's way: each process of a pool takes a line, decodes it, encodes its text and adds the end-of-document
token; the main process writes the documents in order. The two take turns; medians of wall seconds from the start of the
process to its end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LINES_A_TASK = 25


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--theirs", type=Path, metavar="PREFIX", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.theirs:
        return line_by_line(options.input, options.tokenizer, options.theirs, options.workers)
    common = ["--input", str(options.input), "--tokenizer", str(options.tokenizer), "--workers", str(options.workers)]
    times: dict[str, list[float]] = {"line by line, tokenizers": [], "titan-cpt prepare": []}
    with tempfile.TemporaryDirectory() as name:
        for turn in range(options.turns):
            theirs, ours = Path(name) / f"theirs-{turn}", Path(name) / f"ours-{turn}"
            ways = (
                [sys.executable, __file__, *common, "--theirs", str(theirs)],
                [sys.executable, "-m", "titan_cpt", "prepare", *common, "--output", str(ours)],
            )
            for words, taken in zip(ways, times.values(), strict=True):
                begin = time.perf_counter()
                subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
                taken.append(time.perf_counter() - begin)
            for suffix in (".bin", ".idx"):
                if theirs.with_suffix(suffix).read_bytes() != ours.with_suffix(suffix).read_bytes():
                    sys.exit(f"the {suffix} files differ")
        size = sum(len(json.loads(line)["text"].encode()) for line in options.input.open()) / 1e6
    print(f"{size:.1f} MB of text, {options.workers} processes, identical files\n")
    print("| | seconds | MB/s | ratio |\n|---|---|---|---|")
    slow = statistics.median(times["line by line, tokenizers"])
    for what, taken in times.items():
        middle = statistics.median(taken)
        print(f"| {what} | {middle:.1f} | {size / middle:.2f} | {slow / middle:.2f} |")
    print(f"\nencoder only, one process, texts in memory: {encoder_speed(options.input, options.tokenizer):.2f} MB/s")
    return None


def encoder_speed(text: Path, tokenizer: Path) -> float:
    """MB/s of the encoder over the first documents: no reading, no writing; the first pass, with an empty cache."""
    from titan_cpt.data.tokenizer.tokenizer import load_tokenizer

    encoder = load_tokenizer(str(tokenizer))
    encoder.encode("")  # loads the backend
    with text.open() as lines:
        texts = [json.loads(line)["text"] for line in itertools.islice(lines, 5000)]
    begin = time.perf_counter()
    encoder.encode_documents(texts)
    return sum(len(each.encode()) for each in texts) / 1e6 / (time.perf_counter() - begin)


class Encoder:
    """The tokenizer of a pool's process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self) -> None:
        """Load it; called once in each process."""
        from tokenizers import Tokenizer

        Encoder.tokenizer = Tokenizer.from_file(str(self.path))

    def encode(self, line: str) -> list[int]:
        """The ids of a document, with the end-of-document token."""
        ids: list[int] = Encoder.tokenizer.encode(json.loads(line)["text"]).ids
        return [*ids, Encoder.tokenizer.token_to_id("<|endoftext|>")]


def line_by_line(text: Path, tokenizer: Path, prefix: Path, workers: int) -> None:
    """Preprocess as GPT-NeoX does."""
    from tokenizers import Tokenizer

    from titan_cpt.data.formats.indexed_writer import IndexedWriter

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder, entries = Encoder(tokenizer), Tokenizer.from_file(str(tokenizer)).get_vocab_size()
    with (
        multiprocessing.Pool(workers, initializer=encoder.start) as pool,
        text.open() as lines,
        IndexedWriter(prefix, entries) as writer,
    ):
        for ids in pool.imap(encoder.encode, lines, LINES_A_TASK):
            writer.add_document(ids)


if __name__ == "__main__":
    main()
