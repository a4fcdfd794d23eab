"""Settings that are refused on a CPU: the message has the key, the reason and what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from titan_cpt.config.load import load_config
from titan_cpt.errors import PlanError
from titan_cpt.planning.device_rules import CPU_RULES, check_device

TOML = """
[job]
name = "laid-out"
[model]
family = "gpt_neox"
size = "debug"
layers = 8
width = 96
heads = 6
[datasets.pages]
train = "pages"
[training]
global_batch_size = 48
local_batch_size = 8
seq_len = 48
[[stages]]
name = "only"
dataset = "pages"
steps = 2
lr = { schedule = "constant", max = 1e-3 }
"""
TP, PP, CP = (f"parallelism.{name}_parallel_degree" for name in ("tensor", "pipeline", "context"))
RING = "parallelism.context_parallel_method"
ASYNC = "parallelism.enable_async_tensor_parallel"

ON_CPU = [
    ({TP: "2", ASYNC: "true", "compile.enable": "true"}, ["symmetric memory, which only CUDA has"]),
    ({CP: "2", RING: "ring"}, ["no ring attention on a CPU", '"gather"']),
    ({"float8.recipe_name": "rowwise", "compile.enable": "true"}, ["emulated float8 in bfloat16", '"float32"']),
]


@pytest.mark.parametrize(("overrides", "words"), ON_CPU)
def test_refused_on_a_cpu_and_not_on_cuda(tmp_path: Path, overrides: dict[str, str], words: list[str]) -> None:
    """The plan accepts it, as it may be made on another machine."""
    path = tmp_path / "config.toml"
    path.write_text(TOML)
    config = load_config(path, list(overrides.items()))
    with pytest.raises(PlanError) as refusal:
        check_device(config, "cpu")

    assert all(word in str(refusal.value) for word in words)
    check_device(config, "cuda")
    check_device(load_config(path, []), "cpu")


def test_every_cpu_rule_is_tested_here() -> None:
    """One refusal for each rule."""
    assert len(ON_CPU) == len(CPU_RULES)
