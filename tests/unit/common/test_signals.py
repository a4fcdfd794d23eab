"""Signals that request a stop."""

import os
import signal

import pytest
import torch.distributed as dist

from titan_cpt.common.signals import StopRequest
from titan_cpt.distributed.process_group import any_rank_stops


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_recorded_and_interrupts_nothing(number):
    """Before it, no stop is requested; after it, its name is known."""
    with StopRequest() as stop:
        before = any_rank_stops(stop)
        os.kill(os.getpid(), number)

        assert not before
        assert any_rank_stops(stop)
        assert stop.name == number.name


def test_the_previous_signal_handlers_are_restored():
    """Also after an error."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(ZeroDivisionError), StopRequest():
        _ = 1 / 0

    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_sigint_ends_the_process_at_once(tmp_path):
    """The first one requests a stop; the second does not wait for a step that hangs."""
    pid = os.fork()
    if pid == 0:
        with StopRequest():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)
    _, status = os.waitpid(pid, 0)

    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGINT


def test_a_signal_during_the_all_reduce_of_stop_requests_counts_from_the_next_one(monkeypatch):
    """The other ranks have already got their answer; a rank that stopped by itself would leave them waiting."""
    all_reduce = dist.all_reduce

    def interrupted(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGTERM)
        all_reduce(*arguments, **keywords)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with StopRequest() as stop:
            monkeypatch.setattr(dist, "all_reduce", interrupted)
            first = any_rank_stops(stop)
            monkeypatch.setattr(dist, "all_reduce", all_reduce)
            second = any_rank_stops(stop)
    finally:
        dist.destroy_process_group()

    assert (first, second) == (False, True)
    assert stop.name == "SIGTERM"
