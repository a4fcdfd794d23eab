"""Train a tiny model in OLMo-core on a CPU, for olmo_core.sh; runs in OLMo-core's environment.

    torchrun --nproc-per-node 1 olmo_core_run.py MODEL FOLDER [--steps 3] [--decay-all]

Steps of AdamW on random tokens, with OLMo-core's Trainer, and a checkpoint after each of the last three steps in
FOLDER/run. FOLDER/batch.pt has the tokens of the last step and OLMo-core's logits for them before that step. Norms are
not decayed and the embedding is, as in titan_cpt; with --decay-all it is the reverse, as in OLMo-core's own configs.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from olmo_core.config import Config
from olmo_core.data import NumpyDataLoaderConfig, NumpyFSLDatasetConfig, TokenizerConfig
from olmo_core.distributed.checkpoint import load_model_and_optim_state
from olmo_core.nn.attention import AttentionType, SlidingWindowAttentionConfig
from olmo_core.nn.rope import RoPEType, StepwiseRoPEScalingConfig, YaRNRoPEScalingConfig
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import AdamWConfig, CosWithWarmup, OptimGroupOverride, SkipStepAdamWConfig
from olmo_core.train import (
    Duration,
    TrainerConfig,
    prepare_training_environment,
    teardown_training_environment,
)
from olmo_core.train.callbacks import CheckpointerCallback, ConfigSaverCallback
from olmo_core.train.train_module import TransformerTrainModuleConfig

SEQ_LEN = 32  # tokens that are predicted; OLMo-core's sequences have one more
BATCH = 4  # sequences of a step
FIRST = 7  # the first and the last token of each sequence, so that in any order they are one stream
VOCABULARY = 257  # those of bytes, the default tokenizer of titan_cpt

_BASE = {
    "d_model": 64,
    "vocab_size": 320,
    "n_layers": 2,
    "n_heads": 4,
    "rope_theta": 10_000,
    "hidden_size_multiple_of": 32,
}
_OLMO = {"qk_norm": True, "block_name": "reordered_norm", "layer_norm_eps": 1e-6}
_WINDOWS = SlidingWindowAttentionConfig(
    pattern=[8, 8, 8, -1], force_full_attention_on_first_layer=False, force_full_attention_on_last_layer=True
)
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"n_kv_heads": 2},
    "qwen3": {"n_kv_heads": 2, "qk_norm": True, "use_head_qk_norm": True, "head_dim": 32, "layer_norm_eps": 1e-6},
    "tied": {"n_kv_heads": 2, "tie_word_embeddings": True},
    "complex": {"n_kv_heads": 2, "rope_type": RoPEType.complex},
    "yarn": {"rope_scaling": YaRNRoPEScalingConfig(factor=4.0, old_context_len=64)},
    "stepwise": {"rope_scaling": StepwiseRoPEScalingConfig(factor=4.0, old_context_len=16)},
    "fused": {"n_kv_heads": 2},
    "skip": {"n_kv_heads": 2},
    "uncounted": {"n_kv_heads": 2},
    "olmo2": _OLMO,
    "olmo3": {**_OLMO, "n_layers": 4, "sliding_window": _WINDOWS},
}


@dataclass
class Experiment(Config):
    """What OLMo-core's own scripts save as config.json."""

    model: TransformerConfig
    dataset: NumpyFSLDatasetConfig
    data_loader: NumpyDataLoaderConfig
    trainer: TrainerConfig
    train_module: TransformerTrainModuleConfig


def experiment(name: str, folder: Path, steps: int, decay_all: bool) -> Experiment:
    """The config of a run."""
    model = TransformerConfig.llama_like(**{**_BASE, **MODELS[name]})
    if name == "fused":
        model.block.sequence_mixer.name = AttentionType.fused_v2
    not_decayed = ["embeddings.weight"] if decay_all else ["*norm.weight"]
    adamw: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    adamw["group_overrides"] = [OptimGroupOverride(params=not_decayed, opts={"weight_decay": 0.0})]
    optim = AdamWConfig(**adamw)
    if name == "skip":
        optim = SkipStepAdamWConfig(**adamw)
    elif name == "uncounted":  # short memories, so that few steps are many
        optim = SkipStepAdamWConfig(**{**adamw, "betas": (0.5, 0.5)}, step_increment_bugfix=False)
    tokenizer = TokenizerConfig(vocab_size=VOCABULARY, eos_token_id=0, pad_token_id=0)
    checkpoints = CheckpointerCallback(save_interval=1, save_async=False, max_checkpoints=3)
    length = SEQ_LEN + 1
    return Experiment(
        model=model,
        dataset=NumpyFSLDatasetConfig(
            paths=[str(folder / "tokens.npy")], sequence_length=length, tokenizer=tokenizer,
            work_dir=str(folder / "work"),
        ),
        data_loader=NumpyDataLoaderConfig(global_batch_size=BATCH * length, seed=0, num_workers=0),
        trainer=TrainerConfig(
            save_folder=str(folder / "run"), max_duration=Duration.steps(steps), metrics_collect_interval=1
        )
        .with_callback("checkpointer", checkpoints)
        .with_callback("config_saver", ConfigSaverCallback()),
        train_module=TransformerTrainModuleConfig(
            rank_microbatch_size=BATCH * length // 2, max_sequence_length=length, optim=optim,
            scheduler=CosWithWarmup(warmup=1), max_grad_norm=1.0,
        ),
    )  # fmt: skip


def main() -> None:
    """Train, and write what titan_cpt's side needs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--decay-all", action="store_true")
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True)
    tokens = np.random.default_rng(5).integers(1, VOCABULARY, (BATCH * options.steps, SEQ_LEN + 1)).astype(np.uint16)
    tokens[:, 0] = tokens[:, -1] = FIRST
    tokens.tofile(folder / "tokens.npy")
    config = experiment(options.model, folder, options.steps, options.decay_all)
    prepare_training_environment(seed=1, backend="cpu:gloo")
    module = config.train_module.build(config.model.build(init_device="meta"))
    loader = config.data_loader.build(config.dataset.build(), dp_process_group=module.dp_process_group)
    trainer = config.trainer.build(module, loader)
    trainer.callbacks["config_saver"].config = config.as_config_dict()
    batches: list[torch.Tensor] = []
    train_batch = module.train_batch

    def noting(batch: dict[str, Any], dry_run: bool = False) -> None:
        batches.append(batch["input_ids"].clone())
        train_batch(batch, dry_run)

    module.train_batch = noting
    trainer.fit()
    model = config.model.build(init_device="cpu")
    load_model_and_optim_state(str(folder / f"run/step{options.steps - 1}/model_and_optim"), model)
    with torch.no_grad():
        logits = model(batches[-1][:, :-1])
    stream = torch.cat([batches[-1][:, :-1].flatten(), torch.tensor([FIRST])])
    torch.save({"tokens": stream, "logits": logits}, folder / "batch.pt")
    teardown_training_environment()


if __name__ == "__main__":
    main()
