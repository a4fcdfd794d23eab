"""glibc keeps freed memory, checked in a process of its own."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from titan_cpt.common.process_settings import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
faults = []
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sum(faults[20:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told")
def test_the_same_memory_is_used_again_without_page_faults():
    """A tensor of 64 MiB made again and again: the last ten of thirty cost no page fault."""
    faults = {
        how: subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True).stdout
        for how in ("default", "kept")
    }

    assert int(faults["default"]) > 10_000
    assert int(faults["kept"]) < 100
