"""Train a tiny llama3 or qwen3 in torchtitan 0.3 on a CPU, for torchtitan.sh; runs in torchtitan's environment.

    torchrun --nproc-per-node 1|2 torchtitan_run.py llama3|qwen3 FOLDER [--initial CHECKPOINT]

Three steps of AdamW on random tokens; DCP checkpoints after steps 2 and 3 in FOLDER/checkpoint. FOLDER/batch.pt has
the tokens of step 3 of all ranks and, from rank 0, the logits of its batch before that step. With --initial,
torchtitan loads that checkpoint as its `initial_load_path`, saves it as step-0, and trains nothing.

torchtitan knows no CPU device, and its attention backends have no backward pass on one: this file tells it that the
device is a CPU, and takes its scaled dot-product attention, which is there for other models. All else is as installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._utils

torch._utils._get_available_device_type = lambda: "cpu"  # before torchtitan looks for an accelerator

import torch.distributed as dist  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torchtitan.components import metrics  # noqa: E402
from torchtitan.components.checkpointer.dcp import CheckpointManager  # noqa: E402
from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.loss import CrossEntropyLoss  # noqa: E402
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig  # noqa: E402
from torchtitan.config import ParallelismConfig, TrainingConfig  # noqa: E402
from torchtitan.distributed import utils as dist_utils  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.models.llama3 import config_registry as llama3  # noqa: E402
from torchtitan.models.qwen3 import config_registry as qwen3  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402

SEQ_LEN = 64
BATCH = 2  # sequences of a rank


class _NoMemoryMonitor(metrics.DeviceMemoryMonitor):
    """A CPU has no device memory to monitor."""

    def __init__(self, device: str = "cpu") -> None:
        self.device_name = "cpu"
        self.device_capacity_gib = 0.0

    def get_peak_stats(self) -> Any:
        return SimpleNamespace(
            max_active_gib=0.0, max_active_pct=0.0, max_reserved_gib=0.0, max_reserved_pct=0.0, num_alloc_retries=0,
            num_ooms=0,
        )  # fmt: skip

    def reset_peak_stats(self) -> None:
        pass


class RandomTokens(BaseDataLoader):
    """Batches of random tokens, cut from one stream for each step: a sequence ends with the first token of the next."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """No settings of its own."""

    def __init__(self, config: Config, *, dp_rank: int, dp_world_size: int, **unused: Any) -> None:
        self.rank = dp_rank
        self.ranks = dp_world_size
        self.step = 0

    def stream(self) -> torch.Tensor:
        """The tokens of all ranks in the current step."""
        generator = torch.Generator().manual_seed(self.step)
        return torch.randint(0, 256, (self.ranks * BATCH * SEQ_LEN + 1,), generator=generator)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:  # noqa: D105
        while True:
            self.step += 1
            stream = self.stream()
            first = self.rank * BATCH * SEQ_LEN
            inputs, labels = stream[first : first + BATCH * SEQ_LEN], stream[first + 1 : first + BATCH * SEQ_LEN + 1]
            yield {"input": inputs.reshape(BATCH, SEQ_LEN).clone()}, labels.reshape(BATCH, SEQ_LEN).clone()

    def state_dict(self) -> dict[str, Any]:
        """The number of batches."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after that number of batches."""
        self.step = state_dict["step"]


class _NoTokenizer:
    """The batches are tokens already."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        def build(self, **unused: Any) -> None:
            return None


def config_of(name: str, folder: Path, initial: str | None) -> Trainer.Config:
    """The debug model of torchtitan, with another attention kernel, batch, optimizer groups and checkpoints."""
    config = llama3.llama3_debugmodel() if name == "llama3" else qwen3.qwen3_debugmodel()
    assert config.model_spec is not None
    for layer in config.model_spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    adamw = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
    config.optimizer = OptimizersContainer.Config(
        param_groups=[  # titan_cpt decays matrices only
            ParamGroupConfig(pattern="norm", optimizer_name="AdamW", optimizer_kwargs={**adamw, "weight_decay": 0.0}),
            ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={**adamw, "weight_decay": 0.1}),
        ]
    )
    config.lr_scheduler = LRSchedulersContainer.Config(warmup_steps=4, total_steps=100)
    config.loss = CrossEntropyLoss.Config()
    config.training = TrainingConfig(
        local_batch_size=BATCH, seq_len=SEQ_LEN, steps=3, mixed_precision_param="float32", disable_cuda_graphs=True
    )
    config.parallelism = ParallelismConfig(spmd_backend="partial_dtensor")
    config.dataloader = RandomTokens.Config()
    config.tokenizer = _NoTokenizer.Config()
    config.activation_checkpoint = None
    config.validator.enable = False
    config.debug.save_config_file = "config.json"
    config.dump_folder = str(folder)
    config.checkpoint = CheckpointManager.Config(
        enable=True,
        interval=2,
        last_save_model_only=False,
        initial_load_path=initial,
    )
    return config


def main() -> None:
    """Train, and write what titan_cpt's side needs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=("llama3", "qwen3"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--initial", type=Path)
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    metrics.DeviceMemoryMonitor = _NoMemoryMonitor
    dist_utils.set_pg_timeouts = lambda **unused: None  # its barrier names a GPU
    initial = str(options.initial.absolute()) if options.initial else None
    config = config_of(options.model, folder, initial)
    trainer = config.build()
    for module in trainer.model_parts[0].modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that divides
    seen: list[torch.Tensor] = []
    trainer.model_parts[0].register_forward_hook(lambda module, inputs, logits: seen.append(logits.detach().clone()))
    if initial:
        trainer.checkpointer.load()
        trainer.checkpointer.save(0)
        with torch.no_grad():
            trainer.model_parts[0](trainer.dataloader.stream()[:-1].reshape(-1, SEQ_LEN))
    else:
        trainer.train()
    if dist.get_rank() == 0:
        torch.save({"tokens": trainer.dataloader.stream(), "logits": seen[-1]}, folder / "batch.pt")
    trainer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
