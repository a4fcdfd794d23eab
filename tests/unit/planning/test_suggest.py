"""Suggested parallelism: valid, fits the device, fastest first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from titan_cpt.config.load import load_config
from titan_cpt.data.inventory import take_inventory
from titan_cpt.errors import PlanError
from titan_cpt.planning.memory import fits
from titan_cpt.planning.planner import make_plan
from titan_cpt.planning.suggest import nearest_device, suggest

ROOT = Path(__file__).parents[3]
TEN_BILLION = ROOT / "train_configs" / "10b_pile_to_german.toml"


def titan_cpt(*words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "titan_cpt", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_suggestions_fit_and_come_fastest_first() -> None:
    """Each one uses all ranks and is valid; a device that is too small is refused with the reason."""
    config = load_config(TEN_BILLION)
    inventory = take_inventory(config)
    found = suggest(config, inventory, 64, 80 * 2**30)

    assert found == sorted(found, key=lambda suggestion: suggestion.step_s)
    assert all(suggestion.plan.world_size == 64 for suggestion in found)
    assert all(fits(suggestion.plan.footprint, 80 * 2**30) for suggestion in found)
    with pytest.raises(PlanError, match="no layout of 64 ranks is valid and fits 1 GiB"):
        suggest(config, inventory, 64, 2**30)


def test_suggestions_print_the_assumed_device() -> None:
    """The device with the nearest memory, with figures of NVIDIA's data sheets; --device-memory is required."""
    words = ("plan", "--config", str(TEN_BILLION), "--world-size", "64", "--suggest")
    done = titan_cpt(*words, "--device-memory", "80GiB")
    refused = titan_cpt(*words)

    assert "assumed: 50% of an H100 SXM's 989 TFLOP/s in bfloat16, of 450 GB/s inside a node of 8" in done.stdout
    assert refused.returncode == 2
    assert "--device-memory" in refused.stderr
    assert [nearest_device(size).name for size in (40 * 10**9, 140 * 2**30, 16 * 10**9)] == [
        "A100 40 GB",
        "H200",
        "RTX 4090",
    ]


def test_the_overrides_of_a_suggestion_make_its_plan() -> None:
    """As `--KEY VALUE` on the command line: the fastest one, and the fastest one with a pipeline."""
    inventory = take_inventory(load_config(TEN_BILLION))
    found = suggest(load_config(TEN_BILLION), inventory, 64, 80 * 2**30)
    piped = next(suggestion for suggestion in found if suggestion.plan.parallel_dims.pp > 1)

    for suggestion in (found[0], piped):
        plan = make_plan(load_config(TEN_BILLION, list(suggestion.overrides.items())), inventory, 64)
        assert plan.parallel_dims == suggestion.plan.parallel_dims
        assert plan.footprint == suggestion.plan.footprint


def test_a_stage_of_its_own_length_counts_with_its_own_step_time() -> None:
    """Without communication that is not overlapped, the mean over 132,366 steps of 2048 and 86,000 of 4096 tokens."""
    config = ROOT / "train_configs" / "405m_pile_to_german.toml"
    long = [("seq_len", "4096"), ("global_batch_size", "552")]
    times = []
    for table in (None, "training", "stages.german"):
        loaded = load_config(config, [(f"{table}.{key}", value) for key, value in long if table])
        (best, *_) = suggest(loaded, take_inventory(loaded), 8, 80 * 2**30)
        times.append(best.step_s)
    short, all_long, mixed = times

    assert short < all_long
    assert mixed == pytest.approx((132_366 * short + 86_000 * all_long) / (132_366 + 86_000))
    assert best.reason.startswith("stage 'pile': matmuls")
