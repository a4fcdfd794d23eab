"""The compared shapes, titan_cpt's variants, and the other trainers. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Race:
    """One shape and the work of a step.

    Attributes:
        key: its name on the command line.
        device: "cpu" or "cuda": the device for which the shape is meant.
        shape: the keys of [model].
        steps_a_turn: timed steps of each trainer before the next one's turn.
        variants: titan_cpt's variants that run unless the command line selects others; the first is the reference.
        peers: names of PEERS.
    """

    key: str
    title: str
    device: str
    family: str
    shape: dict[str, int]
    precision: str
    batch: int
    seq_len: int
    steps_a_turn: int
    variants: tuple[str, ...]
    peers: tuple[str, ...]


# titan_cpt's variants: name -> config overrides. A variant that a build or device does not support is reported so.
COMPILED = {"compile.enable": "true"}
TRITON = {"optimizer.implementation": "triton"}
GRAPHS = {"training.cuda_graphs": "true"}
WHOLE = {"compile.scope": "model"}
ATTENTION = {"training.attention_backend": "fastest"}
VARIANTS: dict[str, dict[str, str]] = {
    "eager": {},
    "compiled": COMPILED,
    "triton": {**COMPILED, **TRITON},
    "graphs": {**COMPILED, **GRAPHS},
    "whole": {**COMPILED, **WHOLE},
    "attention": {**COMPILED, **ATTENTION},
    "autotune": {**COMPILED, "compile.mode": "max-autotune-no-cudagraphs"},
    "all": {**COMPILED, **TRITON, **GRAPHS, **WHOLE, **ATTENTION},
    "float8": {**COMPILED, "float8.recipe_name": "tensorwise"},
    "float8-rowwise": {**COMPILED, "float8.recipe_name": "rowwise"},
    "float8-all": {**COMPILED, **TRITON, **WHOLE, **ATTENTION, "float8.recipe_name": "tensorwise"},
}
CPU_VARIANTS = ("eager", "compiled")
GPU_VARIANTS = ("compiled", "all", "triton", "graphs", "whole", "attention", "eager")

ALIKE = " with our allocator setting"
# Name of a peer -> (kind in peers.py, compiled, whether glibc keeps freed memory).
PEERS: dict[str, tuple[str, bool, bool]] = {
    "HF Trainer": ("hf_trainer", False, False),
    "HF Trainer, compiled": ("hf_trainer", True, False),
    "litgpt, compiled": ("litgpt", True, False),
    "plain loop, compiled": ("plain", True, False),
    "torchtitan, compiled": ("torchtitan", True, False),
    "litgpt, compiled" + ALIKE: ("litgpt", True, True),
    "plain loop, compiled" + ALIKE: ("plain", True, True),
    "torchtitan, compiled" + ALIKE: ("torchtitan", True, True),
}
CPU_PEERS = {
    "gpt_neox": (
        "HF Trainer",
        "litgpt, compiled",
        "plain loop, compiled",
        "litgpt, compiled" + ALIKE,
        "plain loop, compiled" + ALIKE,
    ),
    "llama": ("HF Trainer", "litgpt, compiled", "torchtitan, compiled", "torchtitan, compiled" + ALIKE),
}
GPU_PEERS = {
    # HF Trainer is ready in seconds, so that --budget suffices for both goals' trainers.
    "gpt_neox": ("HF Trainer", "plain loop, compiled", "litgpt, compiled"),
    "llama": ("torchtitan, compiled", "HF Trainer", "litgpt, compiled"),
}


def _on_cpu(key: str, title: str, family: str, shape: dict[str, int], precision: str = "bfloat16") -> Race:
    return Race(key, title, "cpu", family, shape, precision, 8, 512, 3, CPU_VARIANTS, CPU_PEERS[family])


def _on_gpu(key: str, title: str, family: str, shape: dict[str, int], work: tuple[int, int], **more: Any) -> Race:
    standard: dict[str, Any] = {
        "precision": "bfloat16",
        "steps_a_turn": 8,
        "variants": GPU_VARIANTS,
        "peers": GPU_PEERS[family],
    }
    return Race(key, title, "cuda", family, shape, batch=work[0], seq_len=work[1], **{**standard, **more})


B = {"layers": 8, "width": 384, "heads": 6, "mlp_width": 1536, "vocab_size": 8192}
RACES: dict[str, Race] = {
    race.key: race
    for race in (
        _on_cpu(
            "A",
            "A: GPT-NeoX, 6 layers, width 128, 4 heads, vocabulary 50304",
            "gpt_neox",
            {"layers": 6, "width": 128, "heads": 4, "mlp_width": 512, "vocab_size": 50304},
        ),
        _on_cpu("B", "B: GPT-NeoX, 8 layers, width 384, 6 heads, vocabulary 8192", "gpt_neox", B),
        _on_cpu("B32", "B in float32", "gpt_neox", B, "float32"),
        _on_cpu(
            "C",
            "C: Llama, 8 layers, width 384, 6 heads, vocabulary 8192",
            "llama",
            {"layers": 8, "width": 384, "heads": 6, "kv_heads": 6, "mlp_width": 1024, "vocab_size": 8192},
        ),
        _on_gpu(
            "Q",
            "Q, the first quick start's: GPT-NeoX, 6 layers, width 256, 8 heads, vocabulary 4,096",
            "gpt_neox",
            {"layers": 6, "width": 256, "heads": 8, "mlp_width": 1024, "vocab_size": 4096},
            (16, 256),
            precision="float32",
            steps_a_turn=50,
        ),
        _on_gpu(
            "G405",
            "G405, the paper's 405M: GPT-NeoX, 24 layers, width 1,024, 16 heads, vocabulary 50,304",
            "gpt_neox",
            {"layers": 24, "width": 1024, "heads": 16, "mlp_width": 4096, "vocab_size": 50304},
            (8, 2048),
            peers=(*GPU_PEERS["gpt_neox"], "HF Trainer, compiled"),
        ),
        _on_gpu(
            "L1B",
            "L1B: Llama, 22 layers, width 2,048, 32 query and 4 key/value heads, MLP 5,632, vocabulary 32,000",
            "llama",
            {"layers": 22, "width": 2048, "heads": 32, "kv_heads": 4, "mlp_width": 5632, "vocab_size": 32000},
            (4, 2048),
            variants=("compiled", "all", "float8", "triton", "graphs", "whole", "attention", "eager"),
        ),
        # The head takes 7 % of the matrix FLOPs of the 8B (vocabulary 128,256). Beside 4 layers it would take 38 %;
        # one of 32,000 takes 13 %.
        _on_gpu(
            "W4096",
            "W4096: Llama, 4 blocks of Llama 3 8B, width 4,096, 32 query and 8 key/value heads, MLP 14,336, "
            "vocabulary 32,000",
            "llama",
            {"layers": 4, "width": 4096, "heads": 32, "kv_heads": 8, "mlp_width": 14336, "vocab_size": 32000},
            (2, 4096),
            variants=("compiled", "float8", "float8-all", "float8-rowwise", "all"),
            peers=("torchtitan, compiled",),
        ),
    )
}
DRY_VARIANTS = ("compiled", "eager", "all", "float8")  # each process costs seconds; these have every key
TINY = {"layers": 2, "width": 64, "heads": 4, "mlp_width": 192, "vocab_size": 512}


def tiny(race: Race) -> Race:
    """The shape made small enough for two CPU cores: the same code path, and speeds that mean nothing."""
    shape = {**TINY, **({"kv_heads": 2} if "kv_heads" in race.shape else {})}
    variants = tuple(name for name in race.variants if name in DRY_VARIANTS)
    title, peers = f"{race.key}, tiny (dry run)", tuple(name for name in race.peers if name != "HF Trainer, compiled")
    return replace(race, title=title, shape=shape, batch=2, seq_len=64, steps_a_turn=2, variants=variants, peers=peers)
