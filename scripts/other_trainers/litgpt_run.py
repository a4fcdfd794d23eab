"""Train a tiny model with `litgpt pretrain` on a CPU, for litgpt.sh; runs in litgpt's environment.

    python litgpt_run.py MODEL FOLDER [--weight-decay 0.0]

Three steps of AdamW on random tokens, with two micro-batches each, and a checkpoint after each step. FOLDER/batch.pt
has the tokens of step 3 and litgpt's logits for them before that step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from litgpt import GPT, Config
from litgpt.data import DataModule
from torch.utils.data import DataLoader

SEQ_LEN = 32
BATCH = 4  # sequences of a step
STEPS = 3
VOCABULARY = 257  # those of bytes, the default tokenizer of titan_cpt

_LLAMA = {
    "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "bias": False, "parallel_residual": False,
    "intermediate_size": 96, "rotary_percentage": 1.0,
}  # fmt: skip
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 16}
MODELS: dict[str, dict[str, Any]] = {
    "pythia": {},
    "llama": {**_LLAMA, "n_query_groups": 2, "rope_adjustments": _LLAMA3},
    "mistral": {**_LLAMA, "n_query_groups": 2, "sliding_window_size": 8},
    "qwen2.5": {**_LLAMA, "n_query_groups": 2, "attn_bias": True, "norm_eps": 1e-6},
    "qwen3": {**_LLAMA, "n_query_groups": 2, "norm_qk": True, "norm_eps": 1e-6, "head_size": 32},
    "smollm": {**_LLAMA, "n_query_groups": 1},  # with train.tie_embeddings
}


class RandomTokens(DataModule):
    """Batches of random tokens, cut from one stream for each step: a sequence ends with the first token of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 1

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        """Take over the size of a micro-batch."""
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        """The sequences of all steps in order."""
        sequences = [stream(step)[i * SEQ_LEN : (i + 1) * SEQ_LEN + 1] for step in range(STEPS) for i in range(BATCH)]
        return DataLoader(sequences, batch_size=self.batch_size)

    val_dataloader = train_dataloader


def stream(step: int) -> torch.Tensor:
    """The tokens of a step."""
    return torch.randint(0, VOCABULARY, (BATCH * SEQ_LEN + 1,), generator=torch.Generator().manual_seed(step))


def options_of(model: str, folder: Path, weight_decay: float) -> dict[str, Any]:
    """The config of `litgpt pretrain`. AdamW's other settings are those of its own configs."""
    size = {"block_size": 64, "n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": VOCABULARY, "padding_multiple": 64}
    return {
        "model_name": model,
        "model_config": {**size, **MODELS[model]},
        "out_dir": str(folder),
        "precision": "32-true",
        "data": "litgpt_run.RandomTokens",
        "train": {
            "save_interval": 1, "log_interval": 1, "global_batch_size": BATCH, "micro_batch_size": BATCH // 2,
            "max_tokens": STEPS * BATCH * SEQ_LEN, "max_norm": 1.0, "min_lr": 1e-4, "lr_warmup_steps": 1,
            "max_seq_length": SEQ_LEN, "tie_embeddings": model == "smollm",
        },
        "eval": {"interval": 1000, "max_iters": 1, "initial_validation": False, "final_validation": False},
        "optimizer": {
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": 1e-3, "weight_decay": weight_decay, "betas": [0.9, 0.95]},
        },
        "devices": 1,
        "logger_name": "csv",
    }  # fmt: skip


def main() -> None:
    """Train, and write what titan_cpt's side needs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True)
    config = folder / "pretrain.yaml"
    config.write_text(json.dumps(options_of(options.model, folder, options.weight_decay)))
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-m", "litgpt", "pretrain", "--config", str(config)], check=True, env=here)
    before = folder / f"step-{STEPS - 1:08d}"
    model = GPT(Config.from_file(before / "model_config.yaml"))
    model.load_state_dict(torch.load(before / "lit_model.pth", weights_only=False)["model"])
    tokens = stream(STEPS - 1)
    with torch.no_grad():
        logits = model(torch.stack([tokens[i * SEQ_LEN : (i + 1) * SEQ_LEN] for i in range(BATCH)]))
    torch.save({"tokens": tokens, "logits": logits}, folder / "batch.pt")


if __name__ == "__main__":
    main()
