"""A run whose tokenizer extends another one, and whose stages train parts of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import training
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from titan_cpt.data.formats.indexed_writer import IndexedWriter

BASE_VOCABULARY = 257
"""Ids of the base: 256 bytes and the end of a document."""
VOCABULARY = 265
NEW_ROWS = ["embedding.new", "head.new"]


def write_tokenizers(folder: Path) -> dict[str, Any]:
    """A base of bytes, and an extension by eight merges; returns the table [tokenizer]."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    pairs = [("a", letter) for letter in "bcdefghi"]
    for name, merges in (("base", []), ("extended", pairs)):
        new = {"".join(pair): BASE_VOCABULARY + number for number, pair in enumerate(merges)}
        end = {"<|endoftext|>": BASE_VOCABULARY - 1}
        tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, **end, **new}, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
        tokenizer.save(str(folder / f"{name}.json"))
    return {"path": str(folder / "extended.json"), "extend": {"base": str(folder / "base.json")}}


def write_new_language(prefix: Path, *, tokens: int, seed: int) -> None:
    """Documents in which every third id is a new one."""
    rng = np.random.default_rng(seed)
    with IndexedWriter(prefix, VOCABULARY) as writer:
        for _ in range(tokens // 60):
            ids = rng.integers(97, 117, size=59)
            ids[::3] = rng.integers(BASE_VOCABULARY, VOCABULARY, size=len(ids[::3]))
            writer.add_document([*ids.tolist(), BASE_VOCABULARY - 1])


def four_stages(folder: Path) -> dict[str, Any]:
    """English; then German: new rows, new rows and the last norm with the state kept, everything with two factors."""
    raw = training.two_stages(training.write_languages(folder), folder)
    write_new_language(folder / "new", tokens=4000, seed=0)
    raw["datasets"]["new"] = {"train": str(folder / "new")}
    lr = {"schedule": "constant", "max": 3e-3}
    english = {**raw["stages"][0], "steps": 4, "lr": lr}
    stages = [
        {"name": "rows", "trainable": NEW_ROWS, "lr_scale": {"head.new": 3}},
        {"name": "norm", "trainable": [*NEW_ROWS, "final_norm"], "optimizer_state": "keep"},
        {"name": "all", "lr_scale": {"embedding": 0.1, "head.new": 2, "blocks.0-1": 0.5}, "optimizer_state": "keep"},
    ]
    stages = [{"dataset": "new", "steps": 4, "lr": lr, **stage} for stage in stages]
    kept = {"interval": 2, "keep_latest_k": 9}
    return training.changed(raw, tokenizer=write_tokenizers(folder), stages=[english, *stages], checkpoint=kept)
