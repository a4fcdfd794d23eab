"""Train a tiny model in GPT-NeoX with DeepSpeed on CPUs, for neox.sh; runs in an environment with deepspeed.

    torchrun --nproc-per-node N neox_run.py SOURCE FOLDER [--model gpt_neox|llama] [--tp 2] [--pp 0|1|2]

SOURCE is a checkout of GPT-NeoX. Three steps on random tokens with ZeRO-1 in float32; GPT-NeoX's own functions build
the model, train and save it in FOLDER/global_step2 and 3. FOLDER/batch.pt has the tokens of step 3.

GPT-NeoX expects GPUs: this file replaces the current device by the CPU, the random state of dropout, which is 0, and
apex's or DeepSpeed's fused Adam, which has no CPU kernel, by torch's AdamW of the same equations.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

os.environ["DS_ACCELERATOR"] = "cpu"
SEQ_LEN = 64
BATCH = 4
ROWS = 384
LR = 1e-3


def pretend_gpu() -> None:
    """What GPT-NeoX asks torch.cuda for, answered for a CPU."""
    cuda = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.device_count = lambda: 0
    cuda.get_rng_state = lambda *unused: torch.get_rng_state()
    cuda.set_rng_state = lambda *unused, **unused_too: None
    cuda.manual_seed = lambda *unused: None
    cuda.synchronize = lambda *unused: None
    torch.Tensor.cuda = lambda self, *unused, **unused_too: self
    cuda.LongTensor = torch.LongTensor


def config_of(options: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """The config, as one of GPT-NeoX's YAML files has it."""
    data = ranks // (options.tp * max(options.pp, 1))
    llama = options.model == "llama"
    shape: dict[str, Any] = {"activation": "gelu", "norm": "layernorm", "gpt_j_residual": True, "rotary_pct": 0.25}
    if llama:
        shape = {
            "activation": "swiglu",
            "norm": "rmsnorm",
            "rms_norm_epsilon": 1e-5,
            "rotary_pct": 1.0,
            "num_kv_heads": 2,
        }
        shape |= {"use_bias_in_norms": False, "use_bias_in_attn_linear": False, "use_bias_in_mlp": False}
        shape |= {"intermediate_size": 768, "mlp_multiple_of": 64}
    return {
        "num_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "seq_length": SEQ_LEN, "no_weight_tying": True,
        "max_position_embeddings": SEQ_LEN, "pos_emb": "rotary", "precision": "fp32",
        "make_vocab_size_divisible_by": ROWS,
        "pipe_parallel_size": options.pp, "model_parallel_size": options.tp, "attention_dropout": 0.0,
        "hidden_dropout": 0.0, "weight_decay": 0.1, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1},
        "optimizer": {"type": "Adam", "params": {"lr": LR, "betas": [0.9, 0.95], "eps": 1e-8}},
        "lr_decay_style": "constant", "warmup": 0.0, "train_iters": 10, "lr_decay_iters": 10, "min_lr": LR,
        "train_batch_size": BATCH, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": BATCH // data,
        "attention_config": [[["global"], 2]], "save": str(options.folder), "tokenizer_type": "CharLevelTokenizer",
        "checkpoint_factor": 1, "distributed_backend": "gloo", "scaled_upper_triang_masked_softmax_fusion": False,
        "bias_gelu_fusion": False, "attention_softmax_in_fp32": True, "partition_activations": False, **shape,
    }  # fmt: skip


def stream(step: int) -> Tensor:
    """The tokens of a step of all ranks; a sequence ends with the first token of the next."""
    return torch.randint(0, 256, (BATCH * SEQ_LEN + 1,), generator=torch.Generator().manual_seed(step))


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=("gpt_neox", "llama"), default="gpt_neox")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    pretend_gpu()
    sys.path.insert(0, str(options.source))
    import deepspeed
    import deepspeed.comm.torch
    import deepspeed.ops.adam
    import yaml

    deepspeed.ops.adam.FusedAdam = torch.optim.AdamW
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # a compiled reduction in shared memory
    from megatron import mpu
    from megatron.checkpointing import save_checkpoint
    from megatron.neox_arguments import NeoXArgs
    from megatron.training import setup_model_and_optimizer

    deepspeed.init_distributed(dist_backend="gloo")
    ranks = torch.distributed.get_world_size()
    config = config_of(options, ranks)
    args = NeoXArgs.from_dict(
        {**config, "world_size": ranks, "global_num_gpus": ranks, "rank": int(os.environ["RANK"])}
    )
    args.config_files = {"tiny.yml": yaml.safe_dump(config)}
    args.configure_distributed_args()
    args.tokenizer = SimpleNamespace(eod=ROWS - 1, vocab_size=ROWS)
    args.padded_vocab_size = ROWS
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    topology = PipeModelDataParallelTopology(
        num_pp=max(options.pp, 1), num_mp=options.tp, num_dp=ranks // options.tp // max(options.pp, 1)
    )
    mpu.initialize_model_parallel(options.tp, topology=topology)
    mpu.random.get_cuda_rng_tracker().fork = lambda *unused: contextlib.nullcontext()
    model, optimizer, scheduler, _ = setup_model_and_optimizer(args)
    data = mpu.get_data_parallel_rank()
    count = BATCH // mpu.get_data_parallel_world_size()
    for step in (1, 2, 3):
        tokens = stream(step)
        mine = [tokens[i * SEQ_LEN : (i + 1) * SEQ_LEN + 1][None] for i in range(data * count, (data + 1) * count)]
        if options.pp:
            loss = model.train_batch(data_iter=iter([{"text": each} for each in mine]))
        else:
            from megatron.model.gpt2_model import cross_entropy

            for each in mine:
                positions = torch.arange(SEQ_LEN)[None]
                mask = torch.triu(torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool), 1)[None, None]
                model.module.batch_fn = None
                logits = model((each[:, :-1].contiguous(), positions, mask))
                loss = cross_entropy(logits, (each[:, 1:].contiguous(), torch.ones(1, SEQ_LEN)))
                model.backward(loss)
                model.step()
        if data == 0:
            print(f"step {step}: loss {float(loss):.6f}", flush=True)
        if step > 1:
            save_checkpoint(args, step, model, optimizer, scheduler)
    if torch.distributed.get_rank() == 0:
        torch.save({"tokens": stream(3)}, options.folder / "batch.pt")


if __name__ == "__main__":
    main()
