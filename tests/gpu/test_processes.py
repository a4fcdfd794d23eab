"""Processes on GPUs: more of them than GPUs is refused at once, and NCCL works with those that there are."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import training

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


@pytest.fixture
def config(tmp_path):
    """Two stages whose batch divides among any small number of ranks."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    ranks = torch.cuda.device_count() + 1
    return training.write_config(
        training.changed(raw, training={"global_batch_size": ranks, "local_batch_size": 1}), tmp_path / "c.toml"
    )


@pytest.mark.parametrize("launcher", ["run_train.sh", "torchrun"])
def test_more_processes_than_gpus_are_refused_before_anything_waits(config, tmp_path, launcher):
    """In one sentence with the number that is there; it used to wait for ever."""
    there = torch.cuda.device_count()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={there + 1}"]
    command = [str(ROOT / "run_train.sh")] if launcher == "run_train.sh" else [*torchrun, "-m", "titan_cpt", "train"]
    done = subprocess.run(
        [*command, "--config", str(config)],
        env={**os.environ, "NPROC": str(there + 1), "VIRTUAL_ENV": sys.prefix},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == (2 if launcher == "run_train.sh" else 1), done.stdout + done.stderr
    assert "each process needs one" in done.stderr
    assert f"NPROC={there}" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_nccl_and_gloo_work_in_a_group_of_all_gpus():
    """Tensors on the GPU go through NCCL, those on the CPU through gloo, as in a run."""
    program = textwrap.dedent("""
        import torch, torch.distributed as dist
        dist.init_process_group("cuda:nccl,cpu:gloo")
        torch.cuda.set_device(dist.get_rank())
        for device in ("cuda", "cpu"):
            ranks = torch.tensor(float(dist.get_rank() + 1), device=device)
            dist.all_reduce(ranks)
            assert float(ranks) == dist.get_world_size() * (dist.get_world_size() + 1) / 2
        dist.destroy_process_group()
        print("sums agree")
    """)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torch.cuda.device_count()}"]
    script = ["--no-python", sys.executable, "-c", program]
    done = subprocess.run([sys.executable, *torchrun, *script], capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "sums agree" in done.stdout
