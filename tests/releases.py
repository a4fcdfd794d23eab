"""Small Hugging Face models, as transformers saves them, and a Python process to read them in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from titan_cpt.models.build import build_model
from titan_cpt.models.huggingface_config import config_from_spec
from titan_cpt.models.huggingface_weights import to_huggingface
from titan_cpt.models.registry import named_size

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SPECS = {
    "gpt_neox": named_size("gpt_neox", "debug", 257, overrides={"vocab_size": 300}),
    "llama": named_size("llama", "debug", 257, overrides={"vocab_size": 300}),
    "tied qwen3": named_size(
        "llama", "debug", 257, overrides={"vocab_size": 300, "tie_embeddings": True, "qk_norm": True, "head_width": 48}
    ),
}


def release(folder, spec, dtype=torch.float32, seed=1, shard="20KB"):
    """Save a random model with transformers, in shards; returns our model with the same weights."""
    model = build_model(spec)
    model.init_weights(seed)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_from_spec(spec, max_positions=64, dtype="float32")))
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    state = to_huggingface(model.state_dict(), spec)
    theirs.load_state_dict(
        {name.replace("embed_out", "lm_head"): tensor for name, tensor in state.items()}, strict=False
    )
    theirs.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return model


def state_of(spec, load):
    model = build_model(spec)
    load(model)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def python(*words):
    """Run a Python process with these arguments and wait for its end."""
    command = [sys.executable, *(str(word) for word in words)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
