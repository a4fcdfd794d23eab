"""Compare the plan's memory estimate of a rank with the peak resident memory of training, layout by layout.

    python scripts/bench/memory.py                      # all layouts, a few minutes on two cores
    python scripts/bench/memory.py --only tp,pp         # layouts whose name contains one of these words
    python scripts/bench/memory.py --only vocabulary    # activation checkpointing and the chunked loss, on and off
    python scripts/bench/memory.py --only 405M          # the paper's smaller model with its own sequence length
    python scripts/bench/memory.py --device cuda        # six configurations on one GPU, about two minutes
    python scripts/bench/memory.py --device cuda --tiny # the same six, small; on a CPU if there is no GPU

Each layout is a separate launch that builds the run as `titan-cpt train` does and takes two optimizer steps. Measured
is the rise of the process's resident memory from before the model is built to the peak of the second step, of the rank
with the largest rise. glibc's mmap threshold is set so that freed tensors return to the system and the allocator keeps
nothing. Prints a Markdown table; exit status 1 if an estimate is off by more than the promised 15 %.

With `--device cuda`, measured is the most that torch's allocator had allocated in the second step: without CUDA's
context, and without memory that the allocator keeps unused (`reserved` in the JSON file). Promised there: 10 %.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

PROMISED = 0.15
PROMISED_ON_CUDA = 0.10
TOML = """
[job]
name = "memory"
[model]
family = "gpt_neox"
size = "debug"
layers = 8
width = 512
heads = 8
vocab_size = 8192
[datasets.noise]
train = "noise"
[training]
global_batch_size = 8
local_batch_size = 4
seq_len = 512
mixed_precision_param = "float32"
[metrics]
enable_tensorboard = false
[[stages]]
name = "only"
dataset = "noise"
steps = 2
lr = { schedule = "constant", max = 1e-3 }
"""
DP, TP, PP, CP = (
    f"parallelism.{name}_degree"
    for name in ("data_parallel_shard", "tensor_parallel", "pipeline_parallel", "context_parallel")
)
LLAMA = {"model.family": "llama", "model.kv_heads": "4", "model.mlp_width": "1408"}
BF16 = {"training.mixed_precision_param": "bfloat16"}
ONE_BATCH = {"training.global_batch_size": "4"}
SHORT = {"training.global_batch_size": "32", "training.local_batch_size": "32"}
WHOLE_LOGITS = "whole logits"  # not a config key: the loss without chunks
LARGE_HEAD = {**BF16, "model.vocab_size": "50304", "training.local_batch_size": "8"}
THE_PAPERS = {
    **BF16,
    **{"model.layers": "24", "model.width": "1024", "model.heads": "16", "model.vocab_size": "50304"},
    **{"training.seq_len": "2048", "training.global_batch_size": "2", "training.local_batch_size": "1"},
}
LAYOUTS: dict[str, tuple[int, dict[str, str]]] = {
    "one process": (1, ONE_BATCH),
    "one process, accumulating": (1, {}),
    "one process, AC full": (1, {**ONE_BATCH, "activation_checkpoint.mode": "full"}),
    "one process, AC selective op": (1, {**ONE_BATCH, "activation_checkpoint.mode": "selective"}),
    "one process, llama": (1, {**ONE_BATCH, **LLAMA}),
    "one process, bfloat16, 32 x 128": (1, {**BF16, "training.seq_len": "128", **SHORT}),
    "fsdp 2": (2, {}),
    "fsdp 2, never reshard": (2, {"parallelism.fsdp_reshard_after_forward": "never"}),
    "fsdp 2, bfloat16": (2, BF16),
    "fsdp 2, CPU offload": (2, {"training.enable_cpu_offload": "true"}),
    "tp 2": (2, {TP: "2", **ONE_BATCH}),
    "tp 2, llama": (2, {TP: "2", **ONE_BATCH, **LLAMA}),
    "cp 2": (2, {CP: "2", **ONE_BATCH}),
    "pp 2, 1F1B": (2, {PP: "2", **ONE_BATCH}),
    "pp 2, ZBVZeroBubble": (2, {PP: "2", "parallelism.pipeline_parallel_schedule": "ZBVZeroBubble", **ONE_BATCH}),
    **{
        f"vocabulary 50,304, bfloat16, AC {mode}{loss}": (
            1,
            {**LARGE_HEAD, "activation_checkpoint.mode": mode, **chunk},
        )
        for loss, chunk in (("", {}), (", whole logits", {WHOLE_LOGITS: "true"}))
        for mode in ("none", "selective", "full")
    },
    "405M, sequence 2,048, bfloat16": (1, THE_PAPERS),
}
# On one GPU: the shapes of docs/performance.md.
NEOX_405M = {
    **BF16,
    **{"model.size": "405m", "model.layers": "24", "model.width": "1024", "model.heads": "16"},
    **{"model.vocab_size": "50304", "training.seq_len": "2048"},
    **{"training.global_batch_size": "8", "training.local_batch_size": "8"},
}
LLAMA_1B = {
    **BF16,
    **{"model.family": "llama", "model.layers": "22", "model.width": "2048", "model.heads": "32"},
    **{"model.kv_heads": "4", "model.mlp_width": "5632", "model.vocab_size": "32000", "training.seq_len": "2048"},
}
WIDE_4096 = {
    **BF16,
    **{"model.family": "llama", "model.layers": "4", "model.width": "4096", "model.heads": "32"},
    **{"model.kv_heads": "8", "model.mlp_width": "14336", "model.vocab_size": "32000", "training.seq_len": "4096"},
    **{"training.global_batch_size": "2", "training.local_batch_size": "2"},
}
COMPILED = {"compile.enable": "true"}
FULL_CHECKPOINTING = {"activation_checkpoint.mode": "full"}
ON_CUDA: dict[str, tuple[int, dict[str, str]]] = {
    "405M, 8 x 2,048": (1, NEOX_405M),
    "405M, compiled": (1, {**NEOX_405M, **COMPILED}),
    "405M, AC full, 2 x gradient accumulation": (
        1,
        {**NEOX_405M, **FULL_CHECKPOINTING, "training.global_batch_size": "16"},
    ),
    "Llama 1.1B, 4 x 2,048": (1, {**LLAMA_1B, **ONE_BATCH}),
    "Llama 1.1B, compiled": (1, {**LLAMA_1B, **ONE_BATCH, **COMPILED}),
    "Llama, 4 layers of width 4,096, 2 x 4,096, compiled": (1, {**WIDE_4096, **COMPILED}),
}
TINY = {
    **{"model.layers": "2", "model.width": "64", "model.heads": "4", "model.vocab_size": "512"},
    **{"training.seq_len": "32"},
}


def main(arguments: list[str]) -> int:
    """Measure the selected layouts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", help="comma-separated words; only layouts whose name contains one of them"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what to measure on (default: cpu)")
    parser.add_argument("--tiny", action="store_true", help="with --device cuda: small shapes, to try the script")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to a JSON file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(json.loads(options.worker))
        return 0
    on_cuda = options.device == "cuda"
    if on_cuda and not options.tiny and not has_gpu():
        print(
            "memory.py: --device cuda, but torch finds no GPU here: `--tiny` tries the script on a CPU", file=sys.stderr
        )
        return 2
    print("| layout | estimated, MiB | measured, MiB | off by |\n|---|---|---|---|")
    results = []
    for name, (world_size, overrides) in (ON_CUDA if on_cuda else LAYOUTS).items():
        if any(word in name for word in options.only.split(",")):
            small = tiny(overrides) if options.tiny else overrides
            found = measure(world_size, small)
            off = found["planned"] / found["measured"] - 1
            results.append({"layout": name, **found, "off": off})
            print(
                f"| {name} | {found['planned'] / 2**20:.0f} | {found['measured'] / 2**20:.0f} | {off:+.0%} |",
                flush=True,
            )
    promised = PROMISED_ON_CUDA if on_cuda else PROMISED
    if options.json:
        options.json.write_text(json.dumps({"promised": promised, "tiny": options.tiny, "results": results}, indent=1))
    # Shapes this small are all workspaces and rounding: only that they run is checked.
    return int(not options.tiny and max((abs(result["off"]) for result in results), default=0.0) > promised)


def has_gpu() -> bool:
    """Whether torch finds a GPU."""
    import torch

    return torch.cuda.is_available()


def tiny(overrides: dict[str, str]) -> dict[str, str]:
    """The configuration with two small layers and short sequences."""
    smaller = {**overrides, **TINY}
    if "model.mlp_width" in overrides:
        smaller.update({"model.mlp_width": "128", "model.kv_heads": "2"})
    if "model.size" in overrides:
        smaller["model.size"] = "debug"
    return smaller


def measure(world_size: int, overrides: dict[str, str]) -> dict[str, int]:
    """`planned` and `measured` bytes, and on CUDA `reserved` ones, each of the rank with the most."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                sys.executable,
                *(torchrun if world_size > 1 else []),
                str(Path(__file__).resolve()),
                "--worker",
                json.dumps(overrides),
            ],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        found = [json.loads(path.read_text()) for path in Path(folder).glob("rank-*.json")]
    if done.returncode != 0 or len(found) != world_size:
        raise SystemExit(done.stderr[-3000:])
    return {key: max(rank[key] for rank in found) for key in found[0]}


def work(overrides: dict[str, str]) -> None:
    """As one rank: build the run, take two steps, write estimated and measured bytes to rank-N.json."""
    import torch

    from titan_cpt.common.signals import StopRequest
    from titan_cpt.config.load import load_config
    from titan_cpt.data.formats.indexed_writer import IndexedWriter
    from titan_cpt.distributed.process_group import barrier, destroy_process_group, init_process_group
    from titan_cpt.planning import memory
    from titan_cpt.train import Trainer
    from titan_cpt.training import loss
    from titan_cpt.training.build import build

    torch.set_num_threads(1)
    if overrides.pop(WHOLE_LOGITS, None):
        memory.LOGITS_CHUNK = loss.LOGITS_CHUNK = sys.maxsize
    ranks = init_process_group()
    if ranks.rank == 0:
        Path("config.toml").write_text(TOML)
        with IndexedWriter(Path("noise"), 257) as writer:
            writer.add_document(np.random.default_rng(0).integers(0, 257, size=200_000))
    barrier()
    on_cuda = ranks.device.type == "cuda"
    warm_up(ranks.device)
    config, folder = load_config(Path("config.toml"), list(overrides.items())), Path("run")
    folder.mkdir(exist_ok=True)
    before = resident("VmRSS")
    with StopRequest() as stop:
        trainer, _ = build(Trainer, config, ranks, folder, stop)
        stage = trainer.plan.stages[0]
        trainer.model.init_weights(0)
        loader = trainer.open_loader(stage, 0)
        for step in range(2):
            reset_peak(on_cuda=on_cuda)
            trainer.train_step(loader, stage, step)
        costs = trainer.plan.footprint
        if on_cuda:
            found = {
                "planned": costs.memory,
                "measured": torch.cuda.max_memory_allocated(),
                "reserved": torch.cuda.max_memory_reserved(),
            }
        else:
            found = {"planned": costs.memory + costs.host, "measured": resident("VmHWM") - before}
        Path(f"rank-{ranks.rank}.json").write_text(json.dumps(found))
        trainer.log.close()
    destroy_process_group()


def warm_up(device) -> None:  # type: ignore[no-untyped-def]  # only the workers import torch
    """Let the libraries allocate what they allocate once: workspaces of matrix products, autograd's threads."""
    import torch

    layer = torch.nn.Linear(64, 64, device=device)
    layer(torch.ones(64, 64, device=device)).sum().backward()


def reset_peak(*, on_cuda: bool) -> None:
    """Forget the peak so far."""
    if on_cuda:
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM


def resident(name: str) -> int:
    """VmRSS (current) or VmHWM (peak) resident memory of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
