"""Work in a forked process: its result, its exception, and the same without a fork."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from titan_cpt.common import forked
from titan_cpt.common.forked import begin_forked, may_fork
from titan_cpt.errors import DataError


@pytest.fixture(params=[True, False], ids=["forked", "in this process"])
def forks(request, monkeypatch):
    """Both ways; the fork is safe here, whatever other tests have imported."""
    monkeypatch.setattr(forked, "may_fork", lambda: request.param)
    return request.param


def test_the_result_and_the_exception_of_the_work_come_back(forks):
    """And the work ran in another process if it may."""

    def fails() -> None:
        raise DataError("text.jsonl:3: is not JSON")

    assert (begin_forked(os.getpid)() != os.getpid()) is forks
    assert begin_forked(lambda: [1, 2])() == [1, 2]
    with pytest.raises(DataError, match=r"^text\.jsonl:3: is not JSON$"):
        begin_forked(fails)()


def test_work_whose_process_is_killed_is_done_here(forks):
    """Such as by the kernel, for lack of memory."""
    here = os.getpid()

    def work() -> int:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return 7

    assert begin_forked(work)() == 7


def test_a_process_with_threads_does_not_fork():
    """Neither with threads of its own, nor with a library that has some."""
    code = "from titan_cpt.common.forked import may_fork; import sys; {}; print(may_fork())"
    for first, expected in (
        ("import numpy", sys.platform == "linux"),
        ("import pyarrow", False),
        ("import threading, time; threading.Thread(target=time.sleep, args=(0.5,)).start()", False),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code.format(first)], capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stdout.strip() == str(expected), first

    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    assert not may_fork()
    stop.set()
    thread.join()
