"""Readers of files from untrusted sources, for fuzzing: each must read any bytes or raise our own error.

scripts/fuzz.py generates the bytes with atheris, test_untrusted_input_is_refused.py with hypothesis.
"""

from __future__ import annotations

import contextlib
import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.hf_config import read_config
from titan_cpt.checkpoint.hf_files import WeightFiles
from titan_cpt.checkpoint.storage import read_index
from titan_cpt.common.metrics_file import baseline_losses, open_metrics_file, read_metrics
from titan_cpt.config.load import load_config
from titan_cpt.data.formats.indexed import IndexedTokens
from titan_cpt.data.prepare.provenance import read_record, tokenizer_provenance
from titan_cpt.data.tokenizer.ids_fingerprint import byte_tokenizer_json
from titan_cpt.data.tokenizer.tokenizer import load_tokenizer
from titan_cpt.errors import TitanError
from titan_cpt.evaluation.scores import average_score, read_score, score_change
from titan_cpt.models.huggingface_config import spec_from_config
from titan_cpt.reporting.run_log import read_run
from titan_cpt.reporting.summary import summarize_log

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
NEOX_CONFIG = json.dumps(
    {
        "model_type": "gpt_neox",
        "vocab_size": 320,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "hidden_act": "gelu",
        "max_position_embeddings": 128,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
    }
).encode()
LLAMA_CONFIG = json.dumps(
    {
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "tie_word_embeddings": False,
        "attention_bias": False,
    }
).encode()
RECORD = json.dumps(
    {
        "version": 1,
        "tokenizer": {"fingerprint": "00", "vocab_size": 257},
        "text_field": "text",
        "holdout": 0.1,
        "inputs": [{"path": "a.txt", "bytes": 1}],
        "counts": {"documents": 1, "tokens": 4, "held_out_documents": 0, "held_out_tokens": 0},
    }
).encode()
METRICS = b"".join(
    json.dumps(line).encode() + b"\n"
    for line in (
        {"kind": "event", "name": "transition", "stage": "s", "step": 0, "lr": "0.001 at the first step", "data": {}},
        {
            "kind": "validation",
            "stage": "s",
            "step": 0,
            "dataset": "d",
            "loss_nats_per_token": 5.5,
            "perplexity": 244.7,
            "bits_per_byte": 7.9,
            "forgetting_nats_per_token": None,
        },
        {
            "kind": "train",
            "stage": "s",
            "step": 1,
            "run_step": 1,
            "tokens": 64,
            "replayed_tokens": 0,
            "lr": 1e-3,
            "loss_nats_per_token": 5.5,
            "grad_norm": 1.0,
            "tokens_per_s": 10.0,
            "mfu": 0.1,
            "memory_gib": 0.5,
            "batch_hash": "00",
        },
        {"kind": "event", "name": "resume", "time": 2.0, "stage": "s", "step": 1},
    )
)
SCORE = json.dumps(
    {
        "format": 1,
        "task": "t",
        "shots": 0,
        "metric": "acc",
        "metrics": {"acc": [0.5, 0.1]},
        "samples": 2,
        "limit": None,
        "documents": "00",
        "per_sample": {"acc": [0, 1]},
        "identity": {},
        "checkpoint": "c",
        "stage": "s",
        "stage_index": 0,
        "steps_done": 1,
        "run_step": 1,
        "seconds": 0.5,
    }
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


def _released_config(folder: Path) -> None:
    spec_from_config(read_config(folder), str(folder))


def _record(folder: Path) -> None:
    tokenizer_provenance(folder / "data")
    read_record(folder / "data.json")


def _metrics(folder: Path) -> None:
    open_metrics_file(folder / "metrics.jsonl").close()
    record = read_run(folder)
    summarize_log(record)
    baseline_losses(read_metrics(folder))


def _score(folder: Path) -> None:
    score = read_score(folder / "t-0shot.json")
    score_change(score, score)
    average_score([score])


def _index(folder: Path) -> None:
    list(read_index(folder))


KINDS: dict[str, tuple[str, bytes, Callable[[Path], object]]] = {
    "toml": ("config.toml", TOML, _config),
    "idx": ("x.idx", IDX, _indexed),
    "tokenizer": ("tokenizer.json", TOKENIZER, _tokenizer),
    "safetensors": ("model.safetensors", SAFETENSORS, _weights),
    "manifest": ("manifest.json", MANIFEST, manifest.verify),
    "index": ("index.json", INDEX, _index),
    "neox_config": ("config.json", NEOX_CONFIG, _released_config),
    "llama_config": ("config.json", LLAMA_CONFIG, _released_config),
    "record": ("data.json", RECORD, _record),
    "metrics": ("metrics.jsonl", METRICS, _metrics),
    "score": ("t-0shot.json", SCORE, _score),
}
"""Kind -> file name, valid content, and a function that reads the folder that holds the file."""


def read_as(kind: str, content: bytes) -> None:
    """Read bytes as a file of a kind. Any exception from this function is a bug."""
    name, _, reads = KINDS[kind]
    with tempfile.TemporaryDirectory(prefix="untrusted-") as folder:
        (Path(folder) / name).write_bytes(content)
        with contextlib.suppress(TitanError):
            reads(Path(folder))
