"""Write docs/parallelism.md: parallelism_head.md, then tables of the plan's rules and the parity tests' layouts.

`python scripts/docs/parallelism_reference.py > docs/parallelism.md`
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from titan_cpt.config.schema import Config
from titan_cpt.distributed.parallel_dims import SCHEDULES
from titan_cpt.models.registry import named_size
from titan_cpt.planning.device_rules import CPU_RULES
from titan_cpt.planning.parallel_rules import RULES, parallel_problems

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "distributed"))
from parity_layouts import CASES, FLOAT8, LLAMAS, OTHERS, Case

HEAD = Path(__file__).with_name("parallelism_head.md")
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
    return "\n".join([HEAD.read_text(encoding="utf-8"), *_pairs(), *_refused(), *_tested()])


def _pairs() -> list[str]:
    names = list(TECHNIQUES)
    lines = [
        "## Which pairs work together\n",
        "**tested**: by a parity test; yes: supported; no: refused, with the reason below.",
        "Blank below the diagonal: alternatives, of which a run has one.\n",
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
    spec = named_size("gpt_neox", "debug", 257, config.model.model_dump(include={"layers", "width", "heads"}))
    return list(parallel_problems(config, spec, 16))


def _refused() -> list[str]:
    lines = ["\n## Refused by the plan\n", "| combination | reason |", "|---|---|"]
    lines += [f"| {rule.refused} | {rule.because} |" for rule in RULES]
    lines += ["\n## Refused on a CPU\n", "When the run begins, because a plan may be made on another machine.\n"]
    lines += ["| combination | reason |", "|---|---|"]
    return [*lines, *(f"| {rule.refused} | {rule.because} |" for rule in CPU_RULES)]


def _in_code(overrides: dict[str, str]) -> str:
    return ", ".join(f"`{key} {value}`" for key, value in overrides.items())


def _tested() -> list[str]:
    lines = [
        "\n## Parity cases\n",
        "Variants of Llama and other families, all with three query heads for each key/value head:\n",
    ]
    lines += [f"- {model}: {_in_code(overrides) or 'plain'}" for model, overrides in (LLAMAS | OTHERS).items()]
    lines += ["\n| ranks | model | overrides | precision | tolerance of |", "|---|---|---|---|---|"]
    for case in (*CASES, *FLOAT8):
        own = {"toml", "training.mixed_precision_param", *(LLAMAS | OTHERS).get(case.model, ())}
        keys = _in_code({key: value for key, value in case.overrides.items() if key not in own})
        precision = case.overrides.get("training.mixed_precision_param", "float32")
        lines.append(f"| {case.world_size} | {case.model} | {keys} | {precision} | {case.precision} |")
    return lines


if __name__ == "__main__":
    print(reference())
