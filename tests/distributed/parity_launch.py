"""Starts the driver for the tests, on data made from this repository's decisions, and reads what the runs wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from extended import write_tokenizers

from titan_cpt.data.formats.indexed_writer import IndexedWriter

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
TOML = """
[job]
name = "base"
output_dir = "outputs"
[model]
family = "gpt_neox"
size = "debug"
layers = 4
width = 96
heads = 12
vocab_size = 384                # divides by 1, 2, 3 and 4 ranks, so that all layouts have one model
rotary_fraction = 0.5
[datasets.pages]
train = "pages"
validation = "pages-validation"
[training]
global_batch_size = 8
local_batch_size = 8
seq_len = 48
mixed_precision_param = "float32"
[validation]
interval = 100
sequences = 5                   # not a multiple of any batch
[metrics]
enable_tensorboard = false
[[stages]]
name = "first"
dataset = "pages"
steps = 3
lr = { schedule = "constant", max = 1e-3 }
"""
LLAMA = TOML.replace('"gpt_neox"', '"llama"').replace("rotary_fraction = 0.5", "kv_heads = 4\nmlp_width = 192")
SECOND_STAGE = """
[[stages]]
name = "second"
dataset = "pages"
steps = 2
optimizer_state = "keep"
lr = { schedule = "constant", max = 5e-4 }
"""


LENGTHS = """
global_batch_size = { "0" = 4, "384" = 8 }
[[stages]]
name = "second"
dataset = "pages"
steps = 2
seq_len = 96
global_batch_size = 4
local_batch_size = 4
rope = { base = 500.0 }
optimizer_state = "keep"
lr = { schedule = "constant", max = 5e-4 }
"""
"""For the end of a TOML: two steps of 4 sequences and one of 8; then a stage of twice the length with another RoPE."""


def make_data(folder: Path) -> None:
    """Four of the repository's decisions in bytes, and a fifth to validate on: real text that no longer changes.

    Twice: as a document each, and with each line as a document; some are empty, some longer than a sequence.
    """
    pages = [next(ROOT.glob(f"docs/decisions/000{number}-*.md")) for number in range(1, 6)]
    for prefix, chosen in (("pages", pages[:-1]), ("pages-validation", pages[-1:])):
        with IndexedWriter(folder / prefix, 257) as writer:
            for page in chosen:
                writer.add_document(np.append(np.frombuffer(page.read_bytes(), dtype=np.uint8).astype(np.int64), 256))
        with IndexedWriter(folder / prefix.replace("pages", "lines"), 257) as writer:
            for line in b"\n".join(page.read_bytes() for page in chosen).splitlines():
                writer.add_document(np.append(np.frombuffer(line, dtype=np.uint8).astype(np.int64), 256))


def make_inputs(folder: Path) -> None:
    """Data and the TOMLs that runs name."""
    make_data(folder)
    for name, toml in (("gpt_neox", TOML), ("llama", LLAMA)):
        (folder / f"{name}.toml").write_text(toml)
        (folder / f"{name}-two-stages.toml").write_text(toml + SECOND_STAGE)
    (folder / "lengths.toml").write_text(f"{TOML.strip()}{LENGTHS}")
    packed = TOML.replace('train = "pages"', 'train = "lines"\npacking = "best_fit"')
    packed = packed.replace("seq_len = 48", "seq_len = 48\ndocument_mask = true")
    (folder / "packed.toml").write_text(f'{packed}\n[storage]\ncache_dir = "cache"\n')
    write_tokenizers(folder)
    (folder / "quickstart.toml").write_text(tomli_w.dumps(small_quickstart()))


def small_quickstart() -> dict[str, Any]:
    """The shipped quick start with the smallest model, short sequences and three steps a stage, over `make_data`'s."""
    raw = tomllib.loads((ROOT / "train_configs" / "quickstart.toml").read_text())
    del raw["tokenizer"]
    raw["model"] |= {"size": "debug", "vocab_size": 384}
    raw["training"]["seq_len"] = 64
    raw["validation"]["sequences"] = 5
    raw["metrics"] = {"enable_tensorboard": False}
    for dataset in raw["datasets"].values():
        del dataset["source"]
        dataset |= {"train": "pages", "validation": "pages-validation"}
    for stage in raw["stages"]:
        stage["steps"] = 3
    return raw


def launch(folder: Path, runs: list[dict[str, str]], world_size: int, name: str = "") -> None:
    """Train runs on `world_size` ranks, in `folder`; "toml" in a run's overrides names its config."""
    name = name or str(world_size)
    (folder / f"runs-{name}.json").write_text(json.dumps(runs))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    driver = str(Path(__file__).with_name("parity_driver.py"))
    done = subprocess.run(
        [sys.executable, *(torchrun if world_size > 1 else []), driver, f"runs-{name}.json"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    (folder / f"output-{name}.txt").write_text(done.stdout + done.stderr)
    failures = "\n".join(done.stderr.split("FAILED")[1:])[:6000] or done.stderr[-6000:]
    assert done.returncode == 0, f"{folder}: {failures}"


def record(folder: Path, name: str) -> list[dict[str, object]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "outputs" / name / "metrics.jsonl").read_text().splitlines()]
