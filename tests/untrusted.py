"""Files that may come from anyone, a function each that reads some bytes as such a file: our own error, or nothing.

scripts/fuzz.py lets atheris choose the bytes, test_untrusted_input_is_refused.py hypothesis.
"""

from __future__ import annotations

import contextlib
import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

from titan_cpt import manifest
from titan_cpt.checkpoint_files import read_index
from titan_cpt.config_file import load_config
from titan_cpt.data.indexed import IndexedTokens
from titan_cpt.data.tokenizer import load_tokenizer
from titan_cpt.data.tokenizer_ids import byte_tokenizer_json
from titan_cpt.errors import TitanError
from titan_cpt.weight_files import WeightFiles

TOML = b"""
[job]
name = "a"
[model]
family = "gpt_neox"
size = "debug"
[datasets.d]
train = "d"
[training]
global_batch_size = 4
local_batch_size = 2
seq_len = 16
[[stages]]
name = "s"
dataset = "d"
steps = 8
lr = { schedule = "wsd", max = 1e-3, warmup_until = "16", decay_from = 0.8, decay = "sqrt" }
"""
IDX = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ2i2q3q", 1, 8, 2, 3, 3, 1, 0, 6, 0, 1, 2)
_WORDS = byte_tokenizer_json(256)
_WORDS["model"] |= {"vocab": {**_WORDS["model"]["vocab"], "ab": 256, "aab": 257}, "merges": ["a b", "a ab"]}
_WORDS["added_tokens"][0]["id"] = 258
TOKENIZER = json.dumps(_WORDS).encode()
_TABLE = json.dumps({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
SAFETENSORS = struct.pack("<Q", len(_TABLE)) + _TABLE + bytes(16)
MANIFEST = json.dumps(
    {
        "format": 2,
        "stage": "s",
        "stage_index": 0,
        "steps_done": 4,
        "run_step": 4,
        "kind": "interval",
        "recipe": {"training.seq_len": 16},
        "fingerprint": "00",
        "data": {},
        "files": {"manifest.json": {"bytes": 1, "xxh3_128": "0"}},
    }
).encode()
INDEX = json.dumps(
    {"tensors": {"w": {"dtype": "F32", "shape": [2, 2], "parts": [{"at": [0, 0], "shape": [2, 2], "file": "x"}]}}}
).encode()


def _config(folder: Path) -> None:
    load_config(folder / "config.toml")


def _indexed(folder: Path) -> None:
    (folder / "x.bin").write_bytes(struct.pack("<4H", 1, 2, 3, 4))
    IndexedTokens(folder / "x", vocab_size=300).read(0, 4)


def _tokenizer(folder: Path) -> None:
    words = load_tokenizer(str(folder / "tokenizer.json"))
    words.token_byte_lengths()
    words.encode("aab ba\n")


def _weights(folder: Path) -> None:
    files = WeightFiles(folder)
    for name in files.shapes:
        files.read(name)


def _index(folder: Path) -> None:
    list(read_index(folder))


KINDS: dict[str, tuple[str, bytes, Callable[[Path], object]]] = {
    "toml": ("config.toml", TOML, _config),
    "idx": ("x.idx", IDX, _indexed),
    "tokenizer": ("tokenizer.json", TOKENIZER, _tokenizer),
    "safetensors": ("model.safetensors", SAFETENSORS, _weights),
    "manifest": ("manifest.json", MANIFEST, manifest.verify),
    "index": ("index.json", INDEX, _index),
}
"""Kind -> the file's name, a good one, and what reads the folder that it lies in."""


def read_as(kind: str, content: bytes) -> None:
    """Read bytes as a file of a kind; whatever leaves this function is a fault of ours."""
    name, _, reads = KINDS[kind]
    with tempfile.TemporaryDirectory(prefix="untrusted-") as folder:
        (Path(folder) / name).write_bytes(content)
        with contextlib.suppress(TitanError):
            reads(Path(folder))
