"""Measure how long it takes to build the packing index of many documents, in which memory, and how full sequences are.

    python scripts/bench/packing.py [--documents 100000000] [--seq-len 2048,8192,131072]

Writes the .idx of a pair whose document lengths are log-normal, as in web text (median 400 tokens, mean about 730, one
in 60 above 4,096), with a sparse .bin. A separate process then builds the index of each sequence length. The columns
are: seconds of what `titan-cpt plan` does, of building the index from the files, of that in CPU time; the peak of
resident memory; the size of the index; seconds to open and check it; microseconds to find the pieces of a sequence.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MEDIAN_TOKENS, SIGMA = 400, 1.1
BLOCK = 1_000_000


def write_pair(prefix: Path, documents: int) -> None:
    """Write an .idx with random document lengths, and a sparse .bin of the length that it implies."""
    from titan_cpt.data.formats.indexed_layout import DTYPES, HEADER, MAGIC, VERSION

    def sizes() -> Iterator[NDArray[np.int32]]:
        rng = np.random.default_rng(0)
        for start in range(0, documents, BLOCK):
            drawn = rng.lognormal(np.log(MEDIAN_TOKENS), SIGMA, min(BLOCK, documents - start))
            yield np.clip(drawn, 1, 10_000_000).astype("<i4")

    code, tokens = 8, 0
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, code, documents, documents + 1))
        for block in sizes():
            file.write(block.tobytes())
        for block in sizes():
            ends = tokens + np.cumsum(block, dtype=np.int64)
            file.write(((ends - block) * DTYPES[code].itemsize).astype("<i8").tobytes())
            tokens = int(ends[-1])
        for start in range(0, documents + 1, BLOCK):
            file.write(np.arange(start, min(start + BLOCK, documents + 1), dtype="<i8").tobytes())
    with open(f"{prefix}.bin", "wb") as bin_file:
        bin_file.truncate(tokens * DTYPES[code].itemsize)


def measure(prefix: str, seq_len: int, folder: str) -> None:
    """Count the packed sequences, build their index, read 10,000 random ones, and print what that took as JSON."""
    from titan_cpt.data.formats.token_files import TokenFiles, resolve_paths
    from titan_cpt.data.packing.packed_documents import PackedDocuments
    from titan_cpt.object_storage.locations import CacheSettings

    files = TokenFiles((prefix,), cache=CacheSettings(folder, 1 << 30, 1 << 21))
    documents = PackedDocuments("benchmark", files, resolve_paths(files), 256)
    began = time.perf_counter()
    counted = documents.counts(seq_len, log=lambda line: None)
    counting = time.perf_counter() - began
    began, cpu = time.perf_counter(), time.process_time()
    index = documents.index(seq_len, log=lambda line: None)
    building, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began = time.perf_counter()
    index = documents.index(seq_len, log=lambda line: None)
    opening = time.perf_counter() - began
    assert index.counts == counted, f"{index.counts} sequences were built, {counted} counted"
    chosen = np.random.default_rng(1).integers(0, counted.sequences, 10_000).tolist()
    began = time.perf_counter()
    pieces = sum(len(index.pieces(each)) for each in chosen)
    lookup = (time.perf_counter() - began) / len(chosen)
    row = [
        f"{seq_len:,}",
        f"{counted.sequences:,}",
        f"{counted.fill(seq_len):.3%}",
        f"{counted.cut_documents / counted.documents:.2%}",
        f"{pieces / len(chosen):.1f}",
        f"{counting:.1f}",
        f"{building:.1f}",
        f"{cpu:.1f}",
        f"{peak / 2**30:.2f}",
        f"{index.path.stat().st_size / 1e9:.2f}",
        f"{opening:.2f}",
        f"{lookup * 1e6:.0f}",
    ]
    print(json.dumps(row))


def main() -> None:
    """Print a table with a row for each sequence length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000_000)
    parser.add_argument("--seq-len", default="2048,8192,131072")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure[0], int(options.measure[1]), options.measure[2])
    with tempfile.TemporaryDirectory() as name:
        prefix = Path(name) / "documents"
        write_pair(prefix, options.documents)
        print(f"{options.documents:,} documents, {Path(f'{prefix}.bin').stat().st_size // 2:,} tokens\n")
        print(
            "| seq_len | sequences | full | documents cut | pieces per sequence | plan s | build s | CPU s | peak GiB "
            "| index GB | open s | lookup us |\n" + "|---" * 12 + "|"
        )
        for seq_len in options.seq_len.split(","):
            words = [sys.executable, __file__, "--measure", str(prefix), seq_len, name]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            print("| " + " | ".join(json.loads(done.stdout)) + " |", flush=True)
    return None


if __name__ == "__main__":
    main()
