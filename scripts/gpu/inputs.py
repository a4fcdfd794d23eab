"""Configs and token files of the checks: a small model on two made-up languages, the shapes that are measured.

The tokens are generated, so that the checks need neither a network nor a tokenizer; the quick start's own text can be
given as a folder (`check.sh --text`).
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 257
LANGUAGES = ("english", "german")
TINY = "tiny"  # the dry run's shape


@dataclass(frozen=True)
class Shape:
    """A model and the work of a step."""

    model: dict[str, Any]
    vocab_size: int
    batch: int
    seq_len: int


def shape_of(name: str) -> Shape:
    """A shape of the races (scripts/bench/speed/shapes.py: G405, L1B, W4096, Q), or "tiny".

    "L1B@16384" is L1B with sequences of 16,384 tokens, and as many tokens a step or one sequence.
    """
    name, _, length = name.partition("@")
    if length:
        usual = shape_of(name)
        batch = max(1, usual.batch * usual.seq_len // int(length))
        return replace(usual, batch=batch, seq_len=int(length))
    if name == TINY:
        return Shape({"family": "gpt_neox", "size": "debug", "vocab_size": 512}, 512, 4, 64)
    bench = str(ROOT / "scripts" / "bench" / "speed")
    if bench not in sys.path:
        sys.path.append(bench)
    from shapes import RACES

    race = RACES[name]
    return Shape(
        {"family": race.family, "size": "mini", **race.shape}, race.shape["vocab_size"], race.batch, race.seq_len
    )


def write_languages(folder: Path, *, tokens: int) -> None:
    """Two languages, training and validation: after each byte one of three others follows."""
    import numpy as np

    from titan_cpt.data.formats.indexed_writer import IndexedWriter

    for number, name in enumerate(LANGUAGES, start=1):
        follows = np.random.default_rng(number).integers(97, 117, size=(VOCABULARY, 3))
        for suffix, size in (("", tokens), ("-validation", max(tokens // 8, 4096))):
            choices = np.random.default_rng([number, len(suffix)]).integers(0, 3, size=size)
            text, byte = np.empty(size, dtype=np.int64), 97
            for place, choice in enumerate(choices):
                byte = int(follows[byte, choice])
                text[place] = byte
            with IndexedWriter(folder / f"{name}{suffix}", VOCABULARY) as writer:
                for document in np.array_split(text, max(1, size // 600)):
                    writer.add_document([*document.tolist(), VOCABULARY - 1])


def write_text(folder: Path, documents: int = 120) -> None:
    """Made-up text in the two languages of the quick start, as jsonl, for a dry run without the real text."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(LANGUAGES, start=1):
        rng = random.Random(number)
        words = ["".join(rng.choices("abdeghiklmnorstu", k=rng.randint(2, 9))) for _ in range(400)]
        lines = (json.dumps({"text": " ".join(rng.choices(words, k=150))}) for _ in range(documents))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def write_noise(folder: Path, *, vocab_size: int, tokens: int, document: int = 0) -> Path:
    """Tokens that follow Zipf's law; returns their prefix.

    Args:
        document: tokens of every document, which the tokenizer "bytes" ends with 256; 0: no document ends.
    """
    import numpy as np

    from titan_cpt.data.formats.indexed_writer import IndexedWriter

    prefix = folder / f"zipf-{vocab_size}-{document}"
    if not prefix.with_suffix(".idx").exists():
        rng = np.random.default_rng(0)
        with IndexedWriter(prefix, vocab_size) as writer:
            for _ in range(-(-tokens // (document or 2000))):
                text = rng.zipf(1.3, size=document or 2000) % 256
                text[-1] = 256 if document else text[-1]
                writer.add_document(text.tolist())
    return prefix


def small_config(data: Path, out: Path, *, tiny: bool, **tables: dict[str, Any]) -> dict[str, Any]:
    """Two stages of a small model with float32 products; `tables` replace keys of tables, by the table's name."""
    steps = 6 if tiny else 60
    raw: dict[str, Any] = {
        "job": {"name": "run", "output_dir": str(out)},
        "model": {"family": "gpt_neox", "size": "debug" if tiny else "mini"},
        "datasets": {
            name: {"train": str(data / name), "validation": str(data / f"{name}-validation")} for name in LANGUAGES
        },
        "training": {
            "global_batch_size": 4 if tiny else 16,
            "local_batch_size": 2 if tiny else 8,
            "seq_len": 32 if tiny else 256,
            "mixed_precision_param": "float32",
        },
        "checkpoint": {"interval": 2 if tiny else 15, "keep_latest_k": 2},
        "metrics": {"log_freq": 2 if tiny else 5, "enable_tensorboard": False},
        "validation": {"interval": 3 if tiny else 20, "sequences": 4 if tiny else 32},
        "stages": [
            {
                "name": name,
                "dataset": name,
                "steps": steps,
                "lr": {"schedule": "cosine", "max": 2e-3, "min": 2e-4, "warmup_until": 0.1},
                **({"replay": {"fraction": 0.25}, "optimizer_state": "keep"} if name == "german" else {}),
            }
            for name in LANGUAGES
        ],
    }
    for table, keys in tables.items():
        raw[table] = {**raw.get(table, {}), **keys}
    return raw


def shape_config(
    shape: str, folder: Path, *, steps: int, documents: int = 0, **tables: dict[str, Any]
) -> dict[str, Any]:
    """One stage of a measured shape on generated tokens, bfloat16; `tables` as in `small_config`.

    Args:
        documents: equal documents in each sequence; 0: none ends.
    """
    given = shape_of(shape)
    tokens = (steps + 2) * max(given.batch * given.seq_len, 4096)
    document = given.seq_len // documents if documents else 0
    prefix = write_noise(folder, vocab_size=given.vocab_size, tokens=tokens, document=document)
    raw: dict[str, Any] = {
        "job": {"name": "run", "output_dir": str(folder / "runs")},
        "model": given.model,
        "datasets": {"text": {"train": str(prefix)}},
        "training": {
            "global_batch_size": given.batch,
            "local_batch_size": given.batch,
            "seq_len": given.seq_len,
        },
        "metrics": {"enable_tensorboard": False},
        "stages": [
            {"name": "only", "dataset": "text", "steps": steps, "lr": {"schedule": "constant", "max": 3e-4}},
        ],
    }
    for table, keys in tables.items():
        raw[table] = {**raw.get(table, {}), **keys}
    return raw


def write_config(raw: dict[str, Any], path: Path) -> Path:
    """The config as a TOML file."""
    import tomli_w

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tomli_w.dumps(raw))
    return path


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def numbers_of(run: Path) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """What the run computed, by (kind, stage, step, dataset); of what was written twice, the last. No times."""
    found: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    names = {
        "train": ("loss_nats_per_token", "grad_norm", "lr", "batch_hash", "tokens", "run_step"),
        "validation": ("loss_nats_per_token", "bits_per_byte", "forgetting_nats_per_token"),
    }
    for line in metrics_of(run):
        if line["kind"] in names:
            key = (line["kind"], line.get("stage"), line.get("step"), line.get("dataset"))
            found[key] = tuple(line[name] for name in names[line["kind"]])
    return found


def losses_of(run: Path) -> dict[tuple[str, str, int], float]:
    """The last validation loss of each (stage, dataset), in nats per token."""
    found: dict[tuple[str, str, int], float] = {}
    for line in metrics_of(run):
        if line["kind"] == "validation":
            found[line["stage"], line["dataset"], line["step"]] = line["loss_nats_per_token"]
    return found
