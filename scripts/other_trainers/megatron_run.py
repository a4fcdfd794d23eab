"""Train a tiny GPTModel in Megatron-LM's core on CPUs, for megatron.sh; runs in an environment with megatron-core.

    torchrun --nproc-per-node N megatron_run.py FOLDER [--model llama|qwen3|gpt_neox] [--tp 2] [--pp 2]
        [--distributed-optimizer dp_reshardable|fully_reshardable] [--bf16]

Three steps on random tokens. After steps 2 and 3 the model and its optimizer are saved twice: in FOLDER/torch_dist/
as --ckpt-format torch_dist, by megatron.core.dist_checkpointing, and in FOLDER/torch/ as --ckpt-format torch, with the
file names and contents of megatron/training/checkpointing.py (core_v0.16.0). FOLDER/batch.pt has the tokens of step 3
and the logits of its first sequences before that step.

megatron-core expects GPUs: this file replaces the current device by the CPU, devices named "cuda" likewise, the name
that a gradient's type has there, and the random state of dropout, which is 0. All else is as installed.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

torch.cuda.current_device = lambda: torch.device("cpu")
torch.cuda.synchronize = lambda *unused: None
torch.Tensor.cuda = lambda self, *unused, **unused_too: self
_TYPES = {torch.float32: "torch.cuda.FloatTensor", torch.bfloat16: "torch.cuda.BFloat16Tensor"}
_cast = torch.Tensor.type
torch.Tensor.type = lambda self, *to: _cast(self, *to) if to else _TYPES[self.dtype]


class _OnCpu(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


_OnCpu().__enter__()

from megatron.core import dist_checkpointing, tensor_parallel  # noqa: E402
from megatron.core import parallel_state as ranks  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

SEQ_LEN = 64
BATCH = 4  # sequences of a step, on all data-parallel ranks together
ROWS = 384
LR = 1e-3


class _NoDropout:
    def fork(self, *unused: Any) -> Any:
        return contextlib.nullcontext()

    def is_initialized(self) -> bool:
        return True


def config_of(options: argparse.Namespace) -> TransformerConfig:
    """The model, with Megatron-LM's own kernels for any device."""
    llama = options.model != "gpt_neox"
    shape: dict[str, Any] = {"normalization": "LayerNorm", "activation_func": torch.nn.functional.gelu}
    if llama:
        shape = {"normalization": "RMSNorm", "activation_func": torch.nn.functional.silu, "gated_linear_unit": True}
        shape |= {"num_query_groups": 2, "qk_layernorm": options.model == "qwen3"}
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    return TransformerConfig(
        num_layers=2, hidden_size=128, num_attention_heads=4, ffn_hidden_size=256, add_bias_linear=not llama,
        hidden_dropout=0.0, attention_dropout=0.0, layernorm_epsilon=1e-5, use_cpu_initialization=True,
        tensor_model_parallel_size=options.tp, pipeline_model_parallel_size=options.pp, pipeline_dtype=dtype,
        params_dtype=dtype, bf16=options.bf16, bias_activation_fusion=False, gradient_accumulation_fusion=False,
        masked_softmax_fusion=False, persist_layer_norm=False, bias_dropout_fusion=False,
        batch_p2p_comm=False, deallocate_pipeline_outputs=False, **shape,
    )  # fmt: skip


def arguments_of(options: argparse.Namespace, config: TransformerConfig) -> argparse.Namespace:
    """The arguments that Megatron-LM's training script would save with this model."""
    llama = options.model != "gpt_neox"
    return argparse.Namespace(
        num_layers=2, hidden_size=128, num_attention_heads=4, ffn_hidden_size=256, swiglu=llama, kv_channels=32,
        group_query_attention=llama, num_query_groups=2 if llama else 1, normalization=config.normalization,
        norm_epsilon=1e-5, add_bias_linear=not llama, add_qkv_bias=False, qk_layernorm=config.qk_layernorm,
        position_embedding_type="rope", rotary_percent=1.0 if llama else 0.25, rotary_base=10_000,
        untie_embeddings_and_output_weights=options.model != "qwen3", bias_gelu_fusion=False, padded_vocab_size=ROWS,
        tensor_model_parallel_size=options.tp, pipeline_model_parallel_size=options.pp, seq_length=SEQ_LEN,
        attention_dropout=0.0, hidden_dropout=0.0, optimizer="adam", params_dtype=config.params_dtype,
        model_type=ModelType.encoder_or_decoder, use_distributed_optimizer=bool(options.distributed_optimizer),
    )  # fmt: skip


class Run:
    """One rank of the training."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.config = config_of(options)
        torch.manual_seed(1)
        qwen3 = options.model == "qwen3"
        layers = get_gpt_layer_local_spec(normalization=self.config.normalization, qk_layernorm=qwen3)
        model = GPTModel(
            self.config, layers, vocab_size=ROWS, max_sequence_length=SEQ_LEN, position_embedding_type="rope",
            pre_process=ranks.is_pipeline_first_stage(), post_process=ranks.is_pipeline_last_stage(),
            rotary_percent=1.0 if options.model != "gpt_neox" else 0.25,
            share_embeddings_and_output_weights=qwen3,
        )  # fmt: skip
        self.model = model.bfloat16() if options.bf16 else model
        for name, parameter in self.model.named_parameters():
            if parameter.ndim == 1:
                generator = torch.Generator().manual_seed(len(name))
                parameter.data.add_(torch.rand(parameter.shape, generator=generator) / 2)  # unlike each other
        flat = bool(options.distributed_optimizer)
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=flat, overlap_grad_reduce=flat, bucket_size=60_000
        )
        self.ddp = DistributedDataParallel(self.config, ddp, self.model)
        optimizer = OptimizerConfig(
            optimizer="adam", lr=LR, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, clip_grad=1.0,
            bf16=options.bf16, params_dtype=self.config.params_dtype, use_distributed_optimizer=flat,
        )  # fmt: skip
        self.optimizer = get_megatron_optimizer(optimizer, [self.ddp])
        self.scheduler = OptimizerParamScheduler(
            self.optimizer, init_lr=0.0, max_lr=LR, min_lr=LR, lr_warmup_steps=0, lr_decay_steps=100,
            lr_decay_style="constant", start_wd=0.1, end_wd=0.1, wd_incr_steps=100, wd_incr_style="constant",
        )  # fmt: skip

    def sequences(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of this data-parallel rank, one sequence after another."""
        tokens = stream(step)
        mine = range(ranks.get_data_parallel_rank(), BATCH, ranks.get_data_parallel_world_size())
        for i in mine:
            yield tokens[None, i * SEQ_LEN : (i + 1) * SEQ_LEN], tokens[None, i * SEQ_LEN + 1 : (i + 1) * SEQ_LEN + 1]

    def forward(self, sequences: Any, model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """One sequence's losses, and how they become its loss."""
        tokens, targets = next(sequences)
        positions = torch.arange(SEQ_LEN)[None]
        mask = torch.triu(torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool), 1)[None, None]
        losses = model(tokens, positions, mask, labels=targets)
        return losses, lambda output: (output.float().mean(), {"loss": output.float().mean().detach()})

    def step(self, number: int) -> None:
        """One optimizer step."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=self.forward, data_iterator=self.sequences(number), model=[self.ddp],
            num_microbatches=BATCH // ranks.get_data_parallel_world_size(), seq_length=SEQ_LEN, micro_batch_size=1,
            forward_only=False,
        )  # fmt: skip
        _, norm, _ = self.optimizer.step()
        self.scheduler.step(increment=1)
        if dist.get_rank() == 0:
            print(f"step {number}: gradient norm {norm:.6f}", flush=True)

    def logits(self, step: int) -> Tensor | None:
        """Logits of the first sequence of a step, on the last pipeline stage; the model has only one there."""
        if self.options.pp > 1:
            return None
        tokens = stream(step)[None, :SEQ_LEN]
        mask = torch.triu(torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool), 1)[None, None]
        with torch.no_grad():
            logits = self.model(tokens, torch.arange(SEQ_LEN)[None], mask)
        parts = [torch.empty_like(logits) for _ in range(self.options.tp)]
        dist.all_gather(parts, logits.contiguous(), group=ranks.get_tensor_model_parallel_group())
        return torch.cat(parts, -1).float()

    def save(self, step: int) -> None:
        """Both formats."""
        kind = self.options.distributed_optimizer
        metadata: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
        if kind:
            metadata |= {"distrib_optim_sharding_type": kind, "distrib_optim_fully_reshardable_mem_efficient": False}
        common = {"args": arguments_of(self.options, self.config), "checkpoint_version": 3.0, "iteration": step}
        common["args"].consumed_train_samples = step * BATCH
        common["opt_param_scheduler"] = self.scheduler.state_dict()
        with_group = {**metadata, "dp_cp_group": ranks.get_data_parallel_group(with_context_parallel=True)}
        state = {**common, "model": self.model.sharded_state_dict(metadata=with_group)}
        state["optimizer"] = self.optimizer.sharded_state_dict(state, metadata=with_group)
        folder = self.options.folder / "torch_dist" / f"iter_{step:07d}"
        folder.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        dist_checkpointing.save(state, str(folder), content_metadata=metadata)
        name = f"mp_rank_{ranks.get_tensor_model_parallel_rank():02d}"
        if self.options.pp > 1:
            name += f"_{ranks.get_pipeline_model_parallel_rank():03d}"
        folder = self.options.folder / "torch" / f"iter_{step:07d}" / name
        folder.mkdir(parents=True, exist_ok=True)
        if kind:
            self.optimizer.save_parameter_state(str(folder / "distrib_optim.pt"))
        if ranks.get_data_parallel_rank() == 0:
            model = self.model.state_dict_for_save_checkpoint()
            torch.save(
                {**common, "model": model, "optimizer": self.optimizer.state_dict()}, folder / "model_optim_rng.pt"
            )


def stream(step: int) -> Tensor:
    """The tokens of a step of all ranks; a sequence ends with the first token of the next."""
    return torch.randint(0, 256, (BATCH * SEQ_LEN + 1,), generator=torch.Generator().manual_seed(step))


def main() -> None:
    """Train, and write what titan_cpt's side needs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=("llama", "qwen3", "gpt_neox"), default="llama")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--distributed-optimizer", choices=("dp_reshardable", "fully_reshardable"))
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    tensor_parallel.get_cuda_rng_tracker = lambda *unused, **unused_too: _NoDropout()
    dist.init_process_group("gloo")
    ranks.initialize_model_parallel(options.tp, options.pp)
    run = Run(options)
    run.config.finalize_model_grads_func = finalize_model_grads
    for step in (1, 2):
        run.step(step)
    run.save(2)
    logits = run.logits(3)
    run.step(3)
    run.save(3)
    if dist.get_rank() == 0:
        torch.save({"tokens": stream(3), **({} if logits is None else {"logits": logits})}, options.folder / "batch.pt")
    dist.destroy_process_group()


if __name__ == "__main__":  # dist_checkpointing starts processes that import this file
    main()
