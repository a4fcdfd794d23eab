"""Inputs for tests of `titan-cpt prepare`, and helpers that run it and read its output."""

import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

from titan_cpt.data.formats.indexed import IndexedTokens
from titan_cpt.data.prepare.prepare import prepare


def jsonl(documents: list[str], field: str = "text") -> str:
    return "".join(json.dumps({field: text, "id": number}) + "\n" for number, text in enumerate(documents))


def words(count: int, seed: int = 1) -> list[str]:
    """Documents of random length, all different."""
    draw = random.Random(seed)
    return [f"{number} " + " ".join(draw.choices(["one", "zwei", "drei", "four"], k=draw.randrange(1, 40)))
            for number in range(count)]  # fmt: skip


def documents_of(prefix: Path) -> list[str]:
    """Decode the documents of a pair made with the byte tokenizer."""
    pair = IndexedTokens(prefix, vocab_size=257)
    found: list[list[int]] = [[]]
    for token in pair.read(0, pair.tokens).tolist():
        if token == 256:
            found.append([])
        else:
            found[-1].append(token)
    assert found.pop() == [], "every document ends with the end of document"
    return [bytes(document).decode() for document in found]


def outputs(prefix: Path) -> dict[str, bytes]:
    """{file name: content} of a folder, without the record PREFIX.json."""
    return {
        path.name: path.read_bytes() for path in sorted(prefix.parent.glob(f"{prefix.name}*")) if path.suffix != ".json"
    }


def run(inputs: list[Path | str], output: Path, **options):
    return prepare(inputs=[str(entry) for entry in inputs], output=output, **{"tokenizer": "bytes", **options})


def make_inputs(folder: Path) -> list[Path]:
    """Write inputs of several formats with a few hundred documents."""
    (folder / "a.jsonl").write_text(jsonl(words(400, 1)))
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(jsonl(words(300, 2)).encode()))
    for number, text in enumerate(words(30, 3)):
        (folder / f"c{number:02}.txt").write_text(text)
    pyarrow.parquet.write_table(pyarrow.table({"text": words(300, 4)}), folder / "d.parquet")
    return [folder / "a.jsonl", folder / "b.jsonl.zst", folder / "c*.txt", folder / "d.parquet"]
