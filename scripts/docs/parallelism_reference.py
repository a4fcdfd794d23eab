"""Writes docs/parallelism.md from the rules and the parity tests' layouts.

`python scripts/docs/parallelism_reference.py > docs/parallelism.md`
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from titan_cpt.config import Config
from titan_cpt.config_faults import NOT_AVAILABLE_YET
from titan_cpt.layout import SCHEDULES
from titan_cpt.layout_rules import RULES, layout_faults
from titan_cpt.models.sizes import named_size

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "distributed"))
from parity_layouts import CASES, LLAMAS, Case

HEADER = """# Layouts: what works together, what is tested, what is refused

Made from the rules and the parity tests by `python scripts/docs/parallelism_reference.py > docs/parallelism.md`; a test
holds them together.

Every layout gives the numbers of one process: `tests/distributed/test_parity.py` takes three optimizer steps of the
real trainer and compares losses (to 1e-5 nats per token in float32, 2e-3 in bfloat16), gradient norms (the same,
relative), Adam's mean gradient of every single parameter (to 1e-3 of its norm, 1e-1 in bfloat16), validation losses,
and the hashes of the global batches. A checkpoint is read under any other layout.

The vocabulary is padded to 128 x the tensor-parallel degree, so that a run that is to change its TP degree half-way
should fix `model.vocab_size` at its start. Ranks are numbered with tensor-parallel neighbours side by side and pipeline
ranks farthest apart. Nothing is said to a layout by the model: `titan_cpt/distributed/parallelise.py` applies TP, then
activation checkpointing, compile and FSDP2 from outside, `stages.py` cuts pipeline stages before.

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
}


def reference() -> str:
    """The whole page."""
    return "\n".join([HEADER, *_pairs(), *_refused(), *_absent(), *_tested()])


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
    if any(_has(case, one) and _has(case, other) for case in CASES):
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
    shape = named_size("gpt_neox", "debug", 257, 2, config.model.model_dump(include={"layers", "width", "heads"}))
    return list(layout_faults(config, shape, 16))


def _refused() -> list[str]:
    lines = ["\n## Refused by the plan\n", "| what | because |", "|---|---|"]
    return [*lines, *(f"| {rule.refused} | {rule.because} |" for rule in RULES)]


def _in_code(overrides: dict[str, str]) -> str:
    return ", ".join(f"`{key} {value}`" for key, value in overrides.items())


def _absent() -> list[str]:
    tables = ("parallelism.", "training.", "activation_checkpoint.", "compile.", "float8.")
    keys = [key for key in NOT_AVAILABLE_YET if key.startswith(tables)]
    lines = [
        "\n## Not available yet\n",
        "These keys are known and refused, so that nobody believes they do something:\n",
    ]
    return [*lines, *(f"- `{key}`" for key in keys)]


def _tested() -> list[str]:
    lines = ["\n## Parity cases\n", "The kinds of Llama, all with three heads of queries to one of keys and values:\n"]
    lines += [f"- {model}: {_in_code(overrides) or 'plain'}" for model, overrides in LLAMAS.items()]
    lines += ["\n| ranks | model | overrides | precision |", "|---|---|---|---|"]
    for case in CASES:
        own = {"toml", "training.mixed_precision_param", *LLAMAS.get(case.model, ())}
        keys = _in_code({key: value for key, value in case.overrides.items() if key not in own})
        precision = "bfloat16" if case.bf16 else "float32"
        lines.append(f"| {case.world_size} | {case.model} | {keys} | {precision} |")
    return lines


if __name__ == "__main__":
    print(reference())
