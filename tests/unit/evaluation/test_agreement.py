"""Agreement between ranks: a condition and a loaded task count only if every rank has them."""

import subprocess
import sys

import pytest
import torch.distributed as dist

from titan_cpt.distributed.process_group import ProcessInfo, init_process_group
from titan_cpt.errors import DataError
from titan_cpt.evaluation.agreement import load_on_all_ranks, on_all_ranks

PROGRAM = """
import sys
import torch
import torch.distributed as dist
from titan_cpt.distributed.process_group import ProcessInfo
from titan_cpt.errors import DataError
from titan_cpt.evaluation.agreement import load_on_all_ranks, on_all_ranks

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
process = ProcessInfo(rank, 2, torch.device("cpu"))

def fails(*ranks):
    if rank in ranks:
        raise DataError(f"rank {rank} has no dataset")
    return rank

print([on_all_ranks(rank in holds, process) for holds in ((), (0,), (1,), (0, 1))])
print(load_on_all_ranks(fails, process))
for ranks in ((0,), (1,)):
    try:
        load_on_all_ranks(lambda: fails(*ranks), process)
    except DataError as error:
        print(error)
dist.destroy_process_group()
"""


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo")
def test_two_ranks_agree(tmp_path):
    """What one rank lacks, both lack; an error of one rank is an error on both, and each rank keeps its own value."""
    words = [[sys.executable, "-c", PROGRAM, str(rank), str(tmp_path / "store")] for rank in (0, 1)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in words]
    first, second = [rank.communicate(timeout=120)[0].splitlines() for rank in ranks]

    other = "another rank could not load the dataset of a task"
    assert first == ["[False, False, False, True]", "0", "rank 0 has no dataset", other]
    assert second == ["[False, False, False, True]", "1", other, "rank 1 has no dataset"]


def test_a_single_process_agrees_with_itself():
    """Without a process group."""
    process: ProcessInfo = init_process_group()

    def fails():
        raise DataError("no dataset")

    assert (on_all_ranks(True, process), on_all_ranks(False, process)) == (True, False)
    assert load_on_all_ranks(lambda: 3, process) == 3
    with pytest.raises(DataError, match="no dataset"):
        load_on_all_ranks(fails, process)
