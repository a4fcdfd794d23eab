"""Compare the next optimizer step of another trainer with ours, from two imports of its checkpoints.

    python scripts/other_trainers/next_step.py BEFORE AFTER BATCH.pt --lr LR [--weight-decay 0.1] [--max-norm 1.0] ...

BEFORE and AFTER are checkpoints that `titan-cpt import --from TRAINER` made of the other trainer's checkpoints before
and after one step. BATCH.pt is a dictionary that `torch.save` wrote: "tokens", the tokens of that step (int64, one
dimension: sequence i is tokens[i * seq_len : (i + 1) * seq_len + 1]; ids from 0 to 255, which the byte tokenizer has),
and, if the trainer's run kept them, "logits" of the first sequences before the step.

The script compares the logits of BEFORE, then trains one stage of one step with `titan-cpt train`, from BEFORE with
optimizer_state = "keep", on these tokens, and compares weights, moments and step counts with AFTER. The exit status is
1 if a difference is larger than float32's rounding explains (the limits are constants below), and 0 otherwise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.checkpoint_spec import spec_of_checkpoint
from titan_cpt.checkpoint.state_dict import load_state
from titan_cpt.checkpoint.storage import read_index, shard_key
from titan_cpt.data.formats.indexed_writer import IndexedWriter
from titan_cpt.models.build import build_model
from titan_cpt.models.registry import as_config_table

LOGITS = 1e-4  # largest difference of logits
MOMENTS = 1e-4  # largest difference, relative to the largest value of the same tensor; see below
# Both sides divide all gradients by their norm (clipping), and torch's float32 norm of large tensors on a CPU is off by
# up to 4e-5, depending on how the tensors are sharded. The second moment has the square of that factor.
WEIGHTS = 1e-3  # largest difference, relative to the learning rate, which is about the largest update

NOISE = 1e-6
# Weights are not compared where the root of the second moment is below this share of the largest root of all. Float32
# gives a gradient to about 1e-9 of the largest one, and AdamW divides by the gradient's size: below NOISE rounding
# changes the step by more than WEIGHTS. Seen: 0.001 LR in one element of a GPT-NeoX's embedding, with the share 6e-7.
# The gradients of keys' biases are nothing else than rounding, because the softmax cancels them (Pythia, Qwen2.5). The
# moments are compared everywhere. So are weights whose second moment is 0: their gradient was exactly 0.


def main() -> int:
    """Compare, and print one line for each kind of tensor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("batch", type=Path)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--max-norm", type=float, default=1.0)
    parser.add_argument("--beta1", type=float, default=0.9)
    parser.add_argument("--beta2", type=float, default=0.95)
    parser.add_argument("--eps", type=float, default=1e-8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    batch = torch.load(options.batch, weights_only=True)
    good = True
    if "logits" in batch:
        good &= same_logits(options.before, batch["tokens"], batch["logits"], options.seq_len)
    with tempfile.TemporaryDirectory() as folder:
        good &= same_step(options, train_one_step(options, batch["tokens"], Path(folder)))
    print("equal to float32's rounding" if good else "DIFFERENT")
    return 0 if good else 1


def same_logits(checkpoint: Path, tokens: Tensor, theirs: Tensor, seq_len: int) -> bool:
    """Whether the logits before the step are those of the other trainer."""
    spec = spec_of_checkpoint(manifest.verify(checkpoint), checkpoint)
    model = build_model(spec)
    load_state(checkpoint, model, None)
    inputs = torch.stack([tokens[i * seq_len : (i + 1) * seq_len] for i in range(theirs.shape[0])])
    with torch.no_grad():
        ours = model(inputs)[..., : theirs.shape[-1]]
    largest = float((ours - theirs).abs().max())
    print(f"logits: {tuple(theirs.shape)}, up to {float(theirs.abs().max()):.3g}; largest difference {largest:.2g}")
    return largest <= LOGITS


def train_one_step(options: argparse.Namespace, tokens: Tensor, folder: Path) -> Path:
    """Train one step with `titan-cpt train`; returns its checkpoint."""
    record = manifest.read(options.before)
    spec = spec_of_checkpoint(record, options.before)
    with IndexedWriter(folder / "batch", spec.vocab_size) as writer:
        writer.add_document(tokens.tolist())
    config = f"""
[job]
name = "next"
output_dir = "{folder}"

{as_config_table(spec)}
{"" if "vocab_size" in as_config_table(spec) else f"vocab_size = {spec.vocab_size}"}

[datasets.batch]
train = "{folder}/batch"

[tokenizer]
allow_mismatch = true

[optimizer]
beta1 = {options.beta1}
beta2 = {options.beta2}
eps = {options.eps}
weight_decay = {options.weight_decay}

[training]
seq_len = {options.seq_len}
global_batch_size = {(len(tokens) - 1) // options.seq_len}
local_batch_size = 1
max_norm = {options.max_norm}
mixed_precision_param = "float32"

[metrics]
enable_tensorboard = false

[[stages]]
name = "next"
dataset = "batch"
init = "checkpoint:{options.before.absolute()}"
optimizer_state = "keep"
steps = 1
lr = {{ schedule = "constant", max = {options.lr}, warmup_until = 0 }}
"""
    (folder / "next.toml").write_text(config)
    done = subprocess.run(
        [sys.executable, "-m", "titan_cpt", "train", str(folder / "next.toml")], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"titan-cpt train failed:\n{config}\n{done.stdout}\n{done.stderr}")
    lines = [json.loads(line) for line in (folder / "next" / "metrics.jsonl").read_text().splitlines()]
    step = next(line for line in lines if line["kind"] == "train")
    print(f"titan-cpt train: loss {step['loss_nats_per_token']:.6f}, gradient norm {step['grad_norm']:.6f}")
    return folder / "next" / "next" / "step-00000001"


def same_step(options: argparse.Namespace, mine: Path) -> bool:
    """Whether weights, moments and step counts after the step are those of the other trainer."""
    before, after = dict(tensors(options.before)), dict(tensors(options.after))
    ours = dict(tensors(mine))
    if ours.keys() != after.keys():
        print(f"other tensors: {sorted(ours.keys() ^ after.keys())}")
        return False
    good = True
    kinds = {"weights": "model.", "exp_avg": ".exp_avg", "exp_avg_sq": ".exp_avg_sq", "step counts": ".step"}
    for kind, mark in kinds.items():
        names = [name for name in after if (name.startswith(mark) if kind == "weights" else name.endswith(mark))]
        if kind == "weights":
            loudest = max(float(after[name].max()) for name in after if name.endswith(".exp_avg_sq"))
        difference = {}
        skipped = 0
        for name in names:
            gap = (ours[name] - after[name]).abs()
            if kind == "weights":
                square = after[f"optimizer.state.{name.removeprefix('model.')}.exp_avg_sq"]
                noise = (square > 0) & (square < NOISE**2 * loudest)
                gap[noise] = 0
                skipped += int(noise.sum())
            difference[name] = float(gap.max())
        if kind == "weights":
            worst = max(names, key=lambda name: difference[name])
            limit = WEIGHTS * options.lr
            change = max(float((after[name] - before[name]).abs().max()) for name in names)
            text = f"the step changes weights by up to {change:.3g}; {skipped} elements not compared (noise)"
            fits = difference[worst] <= limit and change > 100 * limit
        else:
            scale = {name: float(after[name].abs().max()) or 1.0 for name in names}
            worst = max(names, key=lambda name: difference[name] / scale[name])
            text = f"{difference[worst] / scale[worst]:.2g} of the largest value"
            fits = difference[worst] <= (0 if kind == "step counts" else MOMENTS) * scale[worst]
        print(f"{kind}: {len(names)} tensors, largest difference {difference[worst]:.2g} ({worst}); {text}")
        good &= fits
    return good


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint of ours that one process wrote."""
    for name, _, shape, shards in read_index(folder):
        whole = torch.empty(shape)
        for shard in shards:
            with safe_open(str(folder / shard.file), framework="pt") as file:
                part = file.get_tensor(shard_key(name, shard.offset))
            box = tuple(slice(at, at + length) for at, length in zip(shard.offset, shard.shape, strict=True))
            whole[box] = part
        yield name, whole


if __name__ == "__main__":
    sys.exit(main())
