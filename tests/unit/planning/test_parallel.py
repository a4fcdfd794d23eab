"""Parallelism degrees, the layers of each pipeline rank, and plans for hundreds of ranks without and with torch."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from titan_cpt.config.load import load_config
from titan_cpt.data.inventory import take_inventory
from titan_cpt.distributed.options import ParallelOptions
from titan_cpt.distributed.parallel_dims import ParallelDims
from titan_cpt.planning.parallel import min_world_size, parallel_dims_of, pipeline_rank_contents
from titan_cpt.planning.planner import make_plan
from titan_cpt.training.dry_run import check_layout

ROOT = Path(__file__).parents[3]
TEN_BILLION = ROOT / "train_configs" / "10b_pile_to_german.toml"


def titan_cpt(*words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "titan_cpt", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_data_parallel_sharding_takes_the_ranks_that_the_other_degrees_leave() -> None:
    """The 10B config has TP 6 x PP 4: 24 ranks at least, and 69 shards on 1656 ranks."""
    config = load_config(TEN_BILLION)
    dims = parallel_dims_of(config, 1656)

    assert min_world_size(config) == 24
    assert (dims.tp, dims.pp, dims.dp_shard, dims.dp_replicate) == (6, 4, 69, 1)
    assert dims.world_size == 1656
    assert parallel_dims_of(config, 24).dp_shard == 1


def test_pipeline_ranks_hold_the_layers_of_their_stages() -> None:
    """Two ranks of a "v" schedule: the first and last quarter with embedding and head, and the two in the middle."""
    found = list(pipeline_rank_contents(ParallelDims(pp=2, tp=2, schedule="DualPipeV", microbatches=4), layers=8))

    assert [(each.pipeline_rank, each.ranks) for each in found] == [(0, range(2)), (1, range(2, 4))]
    assert [each.parts for each in found] == [
        ["embedding", "layers 0 to 1", "layers 6 to 7", "final norm and head"],
        ["layers 2 to 3", "layers 4 to 5"],
    ]


def test_the_10b_model_is_checked_for_1656_ranks() -> None:
    """TP 6 x PP 4 x 69 shards, in under 30 s and 6 GiB, with the parameter counts of the plan."""
    done = titan_cpt("plan", "--config", str(TEN_BILLION), "--world-size", "1656", "--check-layout")
    checked = re.search(r"checked in ([0-9.]+) s and ([0-9.]+) GiB", done.stdout)

    assert done.returncode == 0, done.stderr
    assert checked, done.stdout
    assert float(checked[1]) < 30
    assert float(checked[2]) < 6  # Linux counts the peak of the process that started it, here of all tests before
    assert done.stdout.count("as planned") == 8


@pytest.mark.parametrize(
    ("size", "overrides", "world_size"),
    [
        ("llama3.1-8b", {"tensor_parallel_degree": "8", "pipeline_parallel_degree": "2"}, 48),
        ("qwen2.5-7b", {"tensor_parallel_degree": "4"}, 12),
        ("qwen3-0.6b", {"tensor_parallel_degree": "2", "context_parallel_degree": "2"}, 12),
        ("mistral-7b", {"data_parallel_replicate_degree": "2"}, 6),
    ],
)
def test_released_llamas_are_checked(tmp_path: Path, size: str, overrides: dict[str, str], world_size: int) -> None:
    """Grouped-query attention, biases, QK norm, tied embeddings: the sharded model has the planned parameter counts."""
    toml = tmp_path / "llama.toml"
    toml.write_text(f'extends = "{TEN_BILLION}"\n[model]\nfamily = "llama"\nsize = "{size}"\n')
    degrees = {"tensor_parallel_degree": "1", "pipeline_parallel_degree": "1", **overrides}
    settings = {f"parallelism.{key}": value for key, value in degrees.items()}
    settings |= {"training.global_batch_size": "48", "training.local_batch_size": "8"}
    config = load_config(toml, list(settings.items()))
    plan = make_plan(config, take_inventory(config), world_size)
    lines = list(check_layout(plan, ParallelOptions(torch.bfloat16)))

    assert sum(line.endswith("as planned") for line in lines) == 2 * plan.parallel_dims.pp


@pytest.mark.parametrize(
    ("name", "world_size", "parameters", "per_step"),
    [("10b_pile_to_german", 1656, 9_642_249_216, 16), ("405m_pile_to_german", 276, 405_334_016, 4)],
)
def test_the_shipped_configs_have_the_papers_numbers(
    name: str, world_size: int, parameters: int, per_step: int
) -> None:
    """Parameters, batch, steps, LR and parallelism of Ibrahim et al. 2024, arXiv:2403.08763."""
    config = load_config(ROOT / "train_configs" / f"{name}.toml")
    plan = make_plan(config, take_inventory(config), world_size)

    assert plan.spec.parameters == parameters
    assert plan.step_tokens == 2_260_992
    assert [stage.steps for stage in plan.stages] == [132_366, 86_000]
    assert plan.local_batch_size == per_step
    assert plan.gradient_accumulation_steps == 1
    assert max(plan.stages[0].lr_at(step) for step in (1322, 1323, 1324)) == pytest.approx(
        {"10b": 1.2e-4, "405m": 3e-4}[config.model.size], rel=1e-6
    )


def test_a_plan_does_not_import_torch() -> None:
    """Nor with memory estimates and suggestions."""
    for extra in (["--device-memory", "80GiB"], ["--suggest", "--device-memory", "80GiB"]):
        words = ["plan", "--config", str(TEN_BILLION), "--world-size", "1656", *extra]
        code = (
            "import sys\nfrom titan_cpt.cli import main\n"
            f"try: main({words!r})\nexcept SystemExit as end: assert not end.code, end.code\n"
            "assert 'torch' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)

        assert done.returncode == 0, done.stderr


def test_the_json_has_parallelism_and_memory() -> None:
    """Degrees, layers of each pipeline rank, and whether the memory fits the device."""
    words = ("plan", "--config", str(TEN_BILLION), "--world-size", "1656", "--json", "--device-memory")
    layout = json.loads(titan_cpt(*words, "80GiB").stdout)["layout"]

    assert (layout["pp"], layout["dp_shard"], layout["tp"], layout["microbatches"]) == (4, 69, 6, 4)
    assert layout["pipeline_ranks"][3] == {
        "pipeline_rank": 3,
        "first_rank": 1242,
        "last_rank": 1655,
        "holds": ["layers 27 to 35", "final norm and head"],
    }
    assert layout["fits"] is True
    assert json.loads(titan_cpt(*words, "4GiB").stdout)["layout"]["fits"] is False


def test_the_page_on_parallelism_is_generated() -> None:
    """docs/parallelism.md is the output of the script."""
    script = ROOT / "scripts" / "docs" / "parallelism_reference.py"
    spec = importlib.util.spec_from_file_location("parallelism_reference", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    assert (ROOT / "docs" / "parallelism.md").read_text() == module.reference() + "\n"
