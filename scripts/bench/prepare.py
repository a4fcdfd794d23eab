"""Compare `titan-cpt prepare` with an earlier build and with GPT-NeoX's way of preprocessing, at identical output.

    python scripts/bench/prepare.py --input english.jsonl --tokenizer gpt-neox-20b/tokenizer.json
        [--baseline PYTHON] [--formats jsonl zst] [--turns 3] [--workers 2] [--document-mb 50] [--dry-run]

Each contestant reads a JSONL file with a field `text`, plain or as .zst, tokenizes in --workers processes and writes
.bin and .idx, which must be equal byte for byte. GPT-NeoX's way: each process of a pool takes a line, decodes it,
encodes its text with the `tokenizers` library and adds the end-of-document token; the main process writes the documents
in order. --baseline is the Python of an environment in which another build of titan_cpt is installed.

The contestants take turns; medians of wall seconds from the start of the process to its end, and of the CPU seconds of
all its processes, which a busy machine changes less. Memory is measured in runs of its own: the largest sum of the
proportional set sizes of all processes, read every few milliseconds. --document-mb: memory and time for one document
of that size. --dry-run makes a small text and a small tokenizer, and runs one turn.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

LINES_A_TASK = 25
SECONDS_BETWEEN_SAMPLES = 0.003
ZSTD_LEVEL = 3  # zstd's default
LINE_BY_LINE = "line by line, tokenizers"
BASELINE = "baseline build"
OURS = "titan-cpt prepare"


class Run(NamedTuple):
    """One finished run."""

    seconds: float
    cpu_seconds: float


def main() -> None:
    """Print the tables."""
    options = arguments()
    if options.theirs:
        return line_by_line(options.input, options.tokenizer, options.theirs, options.workers)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.dry_run:
            options.input, options.tokenizer = dry_run_inputs(folder)
            options.turns, options.document_mb = 1, 0.2
        size = sum(len(text.encode()) for text in texts_of(options.input)) / 1e6
        print(f"{size:.1f} MB of text, {options.workers} processes, {options.turns} turns, identical files\n")
        print("| input | contestant | seconds | CPU seconds | MB/s | ratio | peak MB |\n|---|---|---|---|---|---|---|")
        for suffix in options.formats:
            text = options.input if suffix == "jsonl" else compressed(options.input, folder)
            race(text, options, folder, size)
        if options.document_mb:
            document = one_document(options.input, folder, options.document_mb)
            size = document.stat().st_size / 1e6
            race(document, options, folder, size, contestants=[BASELINE, OURS] if options.baseline else [OURS])
    return None


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--baseline", metavar="PYTHON")
    parser.add_argument("--formats", nargs="+", choices=("jsonl", "zst"), default=["jsonl", "zst"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--document-mb", type=float, default=50, help="0 leaves that race out")
    parser.add_argument("--skip-line-by-line", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--theirs", type=Path, metavar="PREFIX", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.dry_run and not (options.input and options.tokenizer):
        parser.error("--input and --tokenizer are required without --dry-run")
    return options


def race(
    text: Path, options: argparse.Namespace, folder: Path, size: float, *, contestants: list[str] | None = None
) -> None:
    """Let the contestants take turns, compare their files, and print a line for each."""
    ways = commands(text, options)
    names = contestants or [name for name in ways if name != LINE_BY_LINE or not options.skip_line_by_line]
    runs: dict[str, list[Run]] = {name: [] for name in names}
    memory = {}
    for turn in range(options.turns + 1):  # the last one measures memory
        outputs = {name: folder / f"{text.name}-{turn}-{place}" for place, name in enumerate(names)}
        for name, output in outputs.items():
            command = [str(output) if word == "OUTPUT" else word for word in ways[name]]
            if turn < options.turns:
                runs[name].append(timed(command, folder, is_baseline=name == BASELINE))
            else:
                memory[name] = peak_megabytes(command, folder, is_baseline=name == BASELINE)
        for suffix in (".bin", ".idx"):
            files = [Path(f"{output}{suffix}") for output in outputs.values()]
            if len({file.read_bytes() for file in files}) != 1:
                sys.exit(f"{text.name}: the {suffix} files differ")
            for file in files:
                file.unlink()
    slow = statistics.median(run.seconds for run in runs[names[0]])
    for name in names:
        seconds = statistics.median(run.seconds for run in runs[name])
        cpu = statistics.median(run.cpu_seconds for run in runs[name])
        cells = f"{seconds:.2f} | {cpu:.2f} | {size / seconds:.1f} | {slow / seconds:.2f} | {memory[name]:.0f}"
        print(f"| {text.name} | {name} | {cells} |", flush=True)


def commands(text: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    """The command of each contestant; OUTPUT stands for its prefix."""
    common = ["--input", str(text.resolve()), "--tokenizer", str(options.tokenizer.resolve())]
    common += ["--workers", str(options.workers)]
    ways = {LINE_BY_LINE: [sys.executable, str(Path(__file__).resolve()), *common, "--theirs", "OUTPUT"]}
    if options.baseline:
        ways[BASELINE] = [options.baseline, "-m", "titan_cpt", "prepare", *common, "--output", "OUTPUT"]
    ways[OURS] = [sys.executable, "-m", "titan_cpt", "prepare", *common, "--output", "OUTPUT"]
    return ways


def start(command: list[str], folder: Path, *, is_baseline: bool) -> subprocess.Popen[bytes]:
    """Start a contestant in a folder without a titan_cpt of its own."""
    environment = dict(os.environ)
    if is_baseline:
        environment.pop("PYTHONPATH", None)
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)


def timed(command: list[str], folder: Path, *, is_baseline: bool) -> Run:
    """Run a contestant to its end."""
    begin = time.perf_counter()
    process = start(command, folder, is_baseline=is_baseline)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit status {process.returncode}")
    return Run(seconds, usage.ru_utime + usage.ru_stime)


def peak_megabytes(command: list[str], folder: Path, *, is_baseline: bool) -> float:
    """Run a contestant, and return the largest sum of the memory of its processes; shared pages count once."""
    process = start(command, folder, is_baseline=is_baseline)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(proportional_kilobytes, family(process.pid))))
        time.sleep(SECONDS_BETWEEN_SAMPLES)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit status {process.returncode}")
    return peak / 1000


def family(pid: int) -> Iterator[int]:
    """A process, its children, their children, ..."""
    yield pid
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [child for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:  # it has ended
        return
    for child in children:
        yield from family(int(child))


def proportional_kilobytes(pid: int) -> int:
    """The memory of a process; of a page that n processes share, 1/n."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def open_text(path: Path) -> IO[str]:
    """Open a .jsonl or .jsonl.zst."""
    if path.suffix != ".zst":
        return path.open(encoding="utf-8")
    import zstandard

    opened: Any = zstandard.open(path, "rt", encoding="utf-8")
    return opened  # type: ignore[no-any-return]


def texts_of(path: Path) -> Iterator[str]:
    """Yield the text of every line."""
    with open_text(path) as lines:
        for line in lines:
            yield json.loads(line)["text"]


def compressed(path: Path, folder: Path) -> Path:
    """Write the .zst of a file."""
    import zstandard

    target = folder / f"{path.name}.zst"
    with path.open("rb") as source, target.open("wb") as packed:
        zstandard.ZstdCompressor(level=ZSTD_LEVEL).copy_stream(source, packed)
    return target


def one_document(path: Path, folder: Path, megabytes: float) -> Path:
    """Write a JSONL of one document: the texts of a file, joined and repeated up to a size."""
    parts: list[str] = []
    missing = int(megabytes * 1e6)
    while missing > 0:
        for text in texts_of(path):
            parts.append(text[:missing])
            missing -= len(text.encode())
            if missing <= 0:
                break
    target = folder / "document.jsonl"
    target.write_text(json.dumps({"text": "\n\n".join(parts)}, ensure_ascii=False) + "\n", encoding="utf-8")
    return target


def dry_run_inputs(folder: Path) -> tuple[Path, Path]:
    """Write a small text and a small tokenizer."""
    from titan_cpt.data.tokenizer.train_bpe import train_bpe

    texts = [f"Der {number}. Zug f\u00e4hrt \u2013 \u201claut\u201d \u2013 \u00fcber die Br\u00fccke.\n" * 60
             for number in range(60)]  # fmt: skip
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": each}, ensure_ascii=False) + "\n" for each in texts), encoding="utf-8")
    train_bpe(texts, 300, folder / "tokenizer.json")
    return text, folder / "tokenizer.json"


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
        open_text(text) as lines,
        IndexedWriter(prefix, entries) as writer,
    ):
        for ids in pool.imap(encoder.encode, lines, LINES_A_TASK):
            writer.add_document(ids)


if __name__ == "__main__":
    main()
