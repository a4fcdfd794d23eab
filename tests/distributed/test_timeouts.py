"""How long ranks wait for each other: [comm]'s two timeouts, and the wait for rank 0's data, which has none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from faulty import free_port
from parity_launch import ROOT, TOML

RANKS = """
import json, os, time, warnings
import torch, torch.distributed as dist
from titan_cpt.distributed.process_group import init_process_group, set_timeouts, wait_for_rank_0

warnings.simplefilter("ignore")
ranks = init_process_group(8)
if ranks.rank == 0:
    time.sleep(10)
began = time.monotonic()
wait_for_rank_0()
told = {"waited_s": time.monotonic() - began}
group = dist.new_group([0, 1])  # not the default one, as those of a mesh with several dimensions
set_timeouts(2)
if ranks.rank == 1:
    time.sleep(6)
try:
    dist.all_reduce(torch.ones(1), group=group)
except RuntimeError as error:
    told["error"] = str(error)
with open(f"told-{ranks.rank}.json", "w") as file:
    json.dump(told, file)
while not os.path.exists(f"told-{1 - ranks.rank}.json"):
    time.sleep(0.1)
os._exit(0)  # gloo's threads may still wait for each other
"""


def test_timeouts_hold_in_every_group_and_not_for_rank_0s_data(tmp_path: Path) -> None:
    """Two ranks with a timeout of 8 s: rank 1 waits 10 s for rank 0's data all the same; then, at 2 s, rank 0 gives up
    a sum in a group of their own for which rank 1 comes 6 s late."""
    (tmp_path / "ranks.py").write_text(RANKS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "ranks.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(torchrun, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    files = sorted(path.name for path in tmp_path.glob("told-*"))
    assert files == ["told-0.json", "told-1.json"], done.stderr
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1)]

    assert told[1]["waited_s"] > 8, done.stderr
    assert "2000ms" in told[0]["error"] or "timed out" in told[0]["error"].lower()


def test_a_node_that_never_starts_ends_the_wait_after_the_configs_timeout(tmp_path: Path) -> None:
    """Node 0 of two, without the other one, with comm.init_timeout_seconds = 3: status 1 after that."""
    (tmp_path / "run.toml").write_text(TOML)
    given = {
        "NNODES": "2",
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "VIRTUAL_ENV": sys.prefix,
    }
    command = [str(ROOT / "run_train.sh"), "--config", "run.toml", "--comm.init_timeout_seconds", "3"]
    environment = {**os.environ, **given}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

    assert done.returncode == 1, done.stderr
    (console,) = (tmp_path / "outputs/base/logs").glob("*/node-0-*/console.txt")
    assert "1 of 2 nodes have joined at 127.0.0.1:" in console.read_text()
