"""Writes docs/parallelism.md from the rules and the parity tests' layouts.

`python scripts/docs/parallelism_reference.py > docs/parallelism.md`
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from titan_cpt.config.schema import Config
from titan_cpt.distributed.parallel_dims import SCHEDULES
from titan_cpt.models.registry import named_size
from titan_cpt.planning.parallel_rules import CPU_RULES, RULES, parallel_problems

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "distributed"))
from parity_layouts import CASES, FLOAT8, LLAMAS, Case

HEADER = """# Layouts: what works together, what is tested, what is refused

Made from the rules and the parity tests by `python scripts/docs/parallelism_reference.py > docs/parallelism.md`; a test
holds them together.

Every layout gives the numbers of one process: `tests/distributed/test_parity.py` takes three optimizer steps of the
real trainer and compares losses (to 1e-5 nats per token in float32, 2e-3 in bfloat16), gradient norms (the same,
relative), Adam's mean gradient of every single parameter (to 1e-3 of its norm, 1e-1 in bfloat16), validation losses,
and the hashes of the global batches. A checkpoint is read under any other layout.

The vocabulary is padded to 128 x the tensor-parallel degree, so that a run that is to change its TP degree half-way
should fix `model.vocab_size` at its start. Ranks are numbered with tensor-parallel neighbours side by side and pipeline
ranks farthest apart. Nothing is said to a layout by the model: `titan_cpt/distributed/parallelize.py` applies TP, then
activation checkpointing, compile and FSDP2 from outside, `stages.py` cuts pipeline stages before.

## The quick start in two processes

Three overrides of the shipped config, 20 steps of each stage (leave the `steps` out for all of it):

```bash
short="--stages.english.steps 20 --stages.german.steps 20"
./run_train.sh $short --job.name one
NPROC=2 ./run_train.sh $short --job.name tp --parallelism.tensor_parallel_degree 2
NPROC=2 ./run_train.sh $short --job.name fsdp --training.local_batch_size 8
NPROC=2 ./run_train.sh $short --job.name pp --parallelism.pipeline_parallel_degree 2
python scripts/compare_losses.py outputs/one outputs/tp outputs/fsdp outputs/pp
```

What the last command printed (torch 2.13.0 on a CPU, float32; the largest difference of 40 steps in nats per token, of
gradient norms relative, of 8 validation losses in nats per token):

| against one | steps | batches | training loss | gradient norm | validation loss |
|---|---|---|---|---|---|
| tp | 40 | the same | 2.3e-04 | 3.2e-04 | 3.2e-05 |
| fsdp | 40 | the same | 2.6e-04 | 3.6e-04 | 3.1e-05 |
| pp | 40 | the same | 5.7e-06 | 6.1e-06 | 2.5e-07 |

All steps but one agree to 1.5e-5 nats per token. The one is German's second, where 20 steps have warmed up to 2e-3 at
once and the loss jumps. German ends at 5.1590 nats per token in all four. A small copy of this is a parity case.

## float8

`float8.recipe_name` converts linear layers by torchao (`pip install 'titan_cpt[float8]'`): those of the blocks whose
weight's two sides divide by 16 x the tensor-parallel degree and whose name holds none of `float8.filter_fqns`. The head
stays, as its product is one operation with the loss. On a CPU torchao emulates it, which the program says: float8's
numbers, without its speed. On CUDA it takes compute capability 8.9 or more; that path was never run by us: no GPU was
at hand.

`float8.enable_fsdp_float8_all_gather` (tensorwise only) casts weights before FSDP2 gathers them, a byte a number; the
plan counts them so. Scales are worked out after every update and whenever weights were loaded. Checkpoints hold plain
float32 and are read with or without float8.

FSDP2 and pipelines scale the same tensors as one process in float8 where the micro-batches are the same, since one
scale covers a micro-batch: the parity tests hold them to 2e-3 nats per token, as a last bit can turn how a number is
rounded. Tensor- and context-parallel ranks scale their share, and the gather in float8 casts from float32 what a single
process in bfloat16 casts from that: these are held to 2e-2. float8 itself is up to 2.5e-2 from bfloat16 there.

## CPU offload, async TP, ring attention

`training.enable_cpu_offload` keeps parameters, gradients and the optimizer in the host's memory (FSDP2's
CPUOffloadPolicy); clipping and AdamW run there. On a CPU it changes nothing but the path through torch, which is how it
is tested. `parallelism.enable_async_tensor_parallel` is torch.compile's overlap over symmetric memory: CUDA only, and
never run by us; torch.compile under TP gave wrong gradients on gloo, so compare a few steps with
`--compile.enable false` before trusting it (`scripts/compare_losses.py`).

`parallelism.context_parallel_method = "ring"` is torch's ring attention for CUDA, in which no rank holds all keys; it
was never run by us either. The default gathers keys and values, on every device.

## Memory

`python scripts/bench/memory.py` takes two steps of a small model (8 layers, width 512, 34 million parameters, batches
of 4 x 512 tokens) under each layout and holds the peak of the resident memory against the plan's figure for a rank:

| layout | worked out, MiB | measured, MiB | off by |
|---|---|---|---|
| one process | 1033 | 1084 | -5% |
| one process, accumulating | 1162 | 1213 | -4% |
| one process, AC full | 621 | 616 | +1% |
| one process, AC selective op | 777 | 802 | -3% |
| one process, llama | 1101 | 1161 | -5% |
| one process, bfloat16, 32 x 128 | 1098 | 1216 | -10% |
| fsdp 2 | 909 | 930 | -2% |
| fsdp 2, never reshard | 969 | 1042 | -7% |
| fsdp 2, bfloat16 | 557 | 585 | -5% |
| fsdp 2, CPU offload | 973 | 929 | +5% |
| tp 2 | 651 | 688 | -5% |
| tp 2, llama | 683 | 726 | -6% |
| cp 2 | 585 | 607 | -4% |
| pp 2, 1F1B | 531 | 505 | +5% |
| pp 2, ZBVZeroBubble | 659 | 651 | +1% |

Measured on a CPU in float32 but where it says otherwise, torch 2.13.0; of several ranks the one that rose most. Off by
less than 15 % is what the plan promises. Attention in bfloat16 over short sequences keeps float32 copies on a CPU,
which the plan does not count. On CUDA the libraries' work space and the allocator's gaps come on top, for which `fits`
keeps 10 % free.

## Planning

`titan-cpt plan --config FILE --world-size N --device-memory 80GiB` shows who holds what, the bytes and the traffic;
`--check-layout` builds the sharded model without memory and counts it; `--suggest` ranks layouts.
"""
TOML: dict[str, Any] = {
    "job": {"name": "table"},
    "model": {"family": "gpt_neox", "size": "debug", "layers": 8, "width": 96, "heads": 12},
    "datasets": {"d": {"train": ["d"]}},
    "training": {"global_batch_size": 64, "local_batch_size": 8, "seq_len": 64, "mixed_precision_param": "float32"},
    "stages": [{"name": "s", "dataset": "d", "steps": 1, "lr": {"schedule": "constant", "max": 1.0}}],
}
TECHNIQUES: dict[str, dict[str, Any]] = {
    "FSDP2": {},
    "HSDP": {"parallelism.data_parallel_replicate_degree": 2},
    "TP": {"parallelism.tensor_parallel_degree": 2},
    "CP": {"parallelism.context_parallel_degree": 2},
    **{
        name: {"parallelism.pipeline_parallel_degree": 2, "parallelism.pipeline_parallel_schedule": name}
        for name in SCHEDULES
    },
    "AC full": {"activation_checkpoint.mode": "full"},
    "AC selective": {"activation_checkpoint.mode": "selective"},
    "AC budget": {"activation_checkpoint.mode": "memory_budget", "compile.enable": True},
    "compile": {"compile.enable": True},
    "reshard always": {"parallelism.fsdp_reshard_after_forward": "always"},
    "bfloat16": {"training.mixed_precision_param": "bfloat16"},
    "CPU offload": {"training.enable_cpu_offload": True},
    "float8": {"float8.recipe_name": "tensorwise"},
    "float8 gather": {"float8.recipe_name": "tensorwise", "float8.enable_fsdp_float8_all_gather": True},
}


def reference() -> str:
    """The whole page."""
    return "\n".join([HEADER, *_pairs(), *_refused(), *_tested()])


def _pairs() -> list[str]:
    names = list(TECHNIQUES)
    lines = [
        "## Pairs\n",
        "**tested** by a parity test; yes: supported; no: refused, with the reason below; blank: excluded by itself.\n",
        "| | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for place, row in enumerate(names):
        cells = [_pair(row, column) for column in names[: place + 1]]
        lines.append(f"| {row} | " + " | ".join(cells + [""] * (len(names) - len(cells))) + " |")
    return lines


def _pair(one: str, other: str) -> str:
    if {one, other} <= set(SCHEDULES) and one != other:
        return ""
    if one != other and one.startswith("AC") and other.startswith("AC"):
        return ""
    if any(_has(case, one) and _has(case, other) for case in (*CASES, *FLOAT8)):
        return "**tested**"
    wanted = {**TECHNIQUES[one], **TECHNIQUES[other]}
    return "no" if _faults(wanted) else "yes"


def _has(case: Case, technique: str) -> bool:
    """Whether a parity case uses a technique; FSDP2 where several ranks shard."""
    wanted = TECHNIQUES[technique]
    degrees = ("data_parallel_replicate", "tensor_parallel", "pipeline_parallel", "context_parallel")
    if technique == "FSDP2":
        ranks = case.world_size
        for degree in degrees:
            ranks //= int(case.overrides.get(f"parallelism.{degree}_degree", 1))
        return ranks > 1
    for key, value in wanted.items():
        found = case.overrides.get(key)
        if key.endswith("_degree"):
            if int(found or 1) < 2:
                return False
        elif key.endswith("schedule"):
            if (found or "1F1B") != value:
                return False
        elif found != str(value).lower() and found != str(value):
            return False
    return True


def _faults(wanted: dict[str, Any]) -> list[str]:
    tables = {name: dict(table) if isinstance(table, dict) else table for name, table in TOML.items()}
    for dotted, value in wanted.items():
        table, key = dotted.split(".")
        tables.setdefault(table, {})[key] = value
    config = Config.model_validate(tables)
    spec = named_size("gpt_neox", "debug", 257, 2, config.model.model_dump(include={"layers", "width", "heads"}))
    return list(parallel_problems(config, spec, 16))


def _refused() -> list[str]:
    lines = ["\n## Refused by the plan\n", "| what | because |", "|---|---|"]
    lines += [f"| {rule.refused} | {rule.because} |" for rule in RULES]
    lines += ["\n## Refused on a CPU\n", "When the run begins; a plan may be made elsewhere.\n"]
    lines += ["| what | because |", "|---|---|"]
    return [*lines, *(f"| {rule.refused} | {rule.because} |" for rule in CPU_RULES)]


def _in_code(overrides: dict[str, str]) -> str:
    return ", ".join(f"`{key} {value}`" for key, value in overrides.items())


def _tested() -> list[str]:
    lines = ["\n## Parity cases\n", "The kinds of Llama, all with three heads of queries to one of keys and values:\n"]
    lines += [f"- {model}: {_in_code(overrides) or 'plain'}" for model, overrides in LLAMAS.items()]
    lines += ["\n| ranks | model | overrides | precision | tolerance of |", "|---|---|---|---|---|"]
    for case in (*CASES, *FLOAT8):
        own = {"toml", "training.mixed_precision_param", *LLAMAS.get(case.model, ())}
        keys = _in_code({key: value for key, value in case.overrides.items() if key not in own})
        precision = case.overrides.get("training.mixed_precision_param", "float32")
        lines.append(f"| {case.world_size} | {case.model} | {keys} | {precision} | {case.precision} |")
    return lines


if __name__ == "__main__":
    print(reference())
