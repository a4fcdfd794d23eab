"""Benchmarks under torchrun: two ranks give the results of one process, with replicated and with sharded weights."""

import json
import os
import subprocess
import sys

import pytest
import small_checkpoints
import torch.distributed as dist

pytest.importorskip("lm_eval", reason="needs lm-eval, which the test extra brings")

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo")

TASKS = ("sums:2", "sums_text:1")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(a checkpoint, the tasks' folder)."""
    folder = tmp_path_factory.mktemp("evaluated")
    return small_checkpoints.imported(folder, "llama"), small_checkpoints.write_tasks(folder)


def evaluated(launcher, places, *words):
    """The JSON that the command prints."""
    checkpoint, tasks = places
    command = ["eval", checkpoint, "--tasks", *TASKS, "--tasks-dir", tasks, "--tokenizer", "bytes", "--json", "--again"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "titan_cpt", *command, "--batch-tokens", "300", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_two_ranks_give_the_results_of_one_process(places):
    """The same scores, errors and texts, with replicated weights and with each rank holding half of every weight."""
    (one,) = evaluated((), places)["checkpoints"].values()
    (shared,) = evaluated(TWO, places)["checkpoints"].values()
    (sharded,) = evaluated(TWO, places, "--shard-weights")["checkpoints"].values()

    assert one["tasks"]["sums"]["samples"] == 20
    assert shared == one
    assert sharded == one
