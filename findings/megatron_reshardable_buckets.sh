#!/usr/bin/env bash
# megatron-core 0.16.1, distributed optimizer, --dist-ckpt-optim-fully-reshardable, gradient buffer of several buckets, of
# which one ends with padding: the optimizer's weights and moments in the checkpoint are those of other elements.
#
# get_parameter_state_dp_zero joins the buckets without the padding at their ends, and
# sharded_param_state_fully_reshardable cuts the parameters out at offsets that count the padding. So every parameter
# after the first padded bucket is read too far behind, and the last ones end with zeros: a warning says that this can
# lead to data corruption. The model's own weights in the checkpoint are right. A bucket is padded to a
# multiple of 128 elements and of the number of data-parallel ranks, so that a hidden size of 128 shows nothing on one
# rank; with --ddp-pad-buckets-for-high-nccl-busbw the multiple is 65,536. Known: Megatron-LM's pull request 5077 (May
# 2026) corrects the offsets; 0.16.1 does not have it.
#
# Output seen (one process; the moments are compared with those of the same step with a single bucket):
#   hidden size 32, 1 bucket: 0 of 9 weights of the optimizer are not the model's
#   hidden size 32, 6 buckets: 7 of 9 weights of the optimizer are not the model's, 7 first moments are others
#   hidden size 128, 1 bucket: 0 of 9 weights of the optimizer are not the model's
#   hidden size 128, 10 buckets: 0 of 9 weights of the optimizer are not the model's, 0 first moments are others
#   hidden size 128, 10 buckets padded to 65,536: 8 of 9 weights of the optimizer are not the model's, 8 first moments are others
#   'embedding.word_embeddings.weight' param range exceeds unpadded buffer by 256 elements. It will be padded with zeros which can lead to data corruption.
#
# megatron-core expects a GPU: as in scripts/other_trainers/megatron_run.py, the CPU stands in for the current device and
# for devices named "cuda", and dropout, which is 0, has no random state. All else is as installed.
# Installs into a temporary folder (2 GB). Exit status 0 if the behaviour is as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-input "torch==2.13.0"
"$folder/venv/bin/pip" install --quiet --no-input numpy psutil megatron-core==0.16.1
cat > "$folder/save.py" <<'PYTHON'
import contextlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

torch.cuda.current_device = lambda: torch.device("cpu")
torch.cuda.synchronize = lambda *unused: None
torch.Tensor.cuda = lambda self, *unused, **unused_too: self
cast = torch.Tensor.type
torch.Tensor.type = lambda self, *to: cast(self, *to) if to else "torch.cuda.FloatTensor"


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


class NoDropout:
    def fork(self, *unused):
        return contextlib.nullcontext()

    def is_initialized(self):
        return True


OnCpu().__enter__()

from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig


def save(hidden, bucket_size, pad, folder):
    """A checkpoint after one step; returns the number of buckets."""
    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=2, hidden_size=hidden, num_attention_heads=4, ffn_hidden_size=64, add_bias_linear=False,
        normalization="RMSNorm", hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True,
        gradient_accumulation_fusion=False, masked_softmax_fusion=False, persist_layer_norm=False,
        bias_dropout_fusion=False, bias_activation_fusion=False,
    )
    layers = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(config, layers, vocab_size=256, max_sequence_length=16, position_embedding_type="rope")
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5)  # the norms' weights are unlike each other
    options = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=True, bucket_size=bucket_size,
        pad_buckets_for_high_nccl_busbw=pad,
    )
    parallel = DistributedDataParallel(config, options, model)
    settings = OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(settings, [parallel])
    tokens, positions = torch.randint(0, 256, (1, 17)), torch.arange(16)[None]
    mask = torch.triu(torch.ones(16, 16, dtype=torch.bool), 1)[None, None]
    parallel(tokens[:, :16], positions, mask, labels=tokens[:, 1:]).mean().backward()
    finalize_model_grads([parallel])
    optimizer.step()
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
    group = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = {"model": model.sharded_state_dict(metadata={**metadata, **group})}
    state["optimizer"] = optimizer.sharded_state_dict(state, metadata={**metadata, **group})
    folder.mkdir()
    dist_checkpointing.save(state, str(folder), content_metadata=metadata)
    return len(parallel.buffers[0].buckets)


def main():
    tensor_parallel.get_cuda_rng_tracker = lambda *unused, **unused_too: NoDropout()
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    single, wrong = None, []
    for hidden, size, pad in ((32, 10**9, False), (32, 3_000, False),
                              (128, 10**9, False), (128, 3_000, False), (128, 3_000, True)):  # fmt: skip
        folder = Path(sys.argv[1]) / f"{hidden}-{size}-{pad}"
        buckets = save(hidden, size, pad, folder)
        saved = dist_checkpointing.load_plain_tensors(str(folder))
        names = [name for name in saved if f"optimizer.state.param.{name}" in saved]
        weights = sum(not torch.equal(saved[f"optimizer.state.param.{name}"], saved[name]) for name in names)
        moments = {name: saved[f"optimizer.state.exp_avg.{name}"] for name in names}
        text = f"hidden size {hidden}, {buckets} bucket{'s' * (buckets > 1)}{' padded to 65,536' * pad}: "
        text += f"{weights} of {len(names)} weights of the optimizer are not the model's"
        wrong.append(weights)
        if buckets == 1:
            single = moments
        else:
            others = sum(not torch.allclose(moments[name], single[name], rtol=1e-3, atol=1e-9) for name in names)
            text += f", {others} first moments are others"
            assert others == weights
        print(text, flush=True)
    assert wrong[0] == wrong[2] == wrong[3] == 0 and wrong[1] > 0 and wrong[4] > 0
    dist.destroy_process_group()


if __name__ == "__main__":  # dist_checkpointing starts processes that import this file
    main()
PYTHON
OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= PYTHONWARNINGS=ignore \
  "$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node=1 "$folder/save.py" "$folder" 2> "$folder/log" ||
  { tail -30 "$folder/log"; exit 1; }
grep -m 1 "embedding.*data corruption" "$folder/log"
