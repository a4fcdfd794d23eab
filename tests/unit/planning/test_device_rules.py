"""Settings that are refused on a CPU: the message has the key, the reason and what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from plans import ASYNC, CP, PARALLEL_TOML, RING, TP

from titan_cpt.config.load import load_config
from titan_cpt.errors import PlanError
from titan_cpt.planning.device_rules import CPU_RULES, check_device

ON_CPU = [
    ({TP: "2", ASYNC: "true", "compile.enable": "true"}, ["symmetric memory, which only CUDA has"]),
    ({CP: "2", RING: "ring"}, ["no ring attention on a CPU", '"gather"']),
    ({"float8.recipe_name": "rowwise", "compile.enable": "true"}, ["emulated float8 in bfloat16", '"float32"']),
    ({"training.cuda_graphs": "true"}, ["training.cuda_graphs", "set it to false"]),
    ({"training.attention_backend": "cudnn"}, ['"cudnn" is a CUDA kernel', '"flash"']),
    ({"optimizer.implementation": "triton"}, ['compiles a kernel for the GPU: use "fused"']),
]
FLEX = ({"training.attention_backend": "flex", "training.document_mask": "true"}, ['"flex" is a CUDA kernel'])


@pytest.mark.parametrize(("overrides", "words"), [*ON_CPU, FLEX])
def test_refused_on_a_cpu_and_not_on_cuda(tmp_path: Path, overrides: dict[str, str], words: list[str]) -> None:
    """The plan accepts it, as it may be made on another machine."""
    path = tmp_path / "config.toml"
    path.write_text(PARALLEL_TOML)
    config = load_config(path, list(overrides.items()))
    with pytest.raises(PlanError) as refusal:
        check_device(config, "cpu")

    assert all(word in str(refusal.value) for word in words)
    check_device(config, "cuda")
    check_device(load_config(path, []), "cpu")


def test_every_cpu_rule_is_tested_here() -> None:
    """One refusal for each rule."""
    assert len(ON_CPU) == len(CPU_RULES)
