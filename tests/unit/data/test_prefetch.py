"""The prefetching thread: in order, ahead by a bounded number, silent about errors, gone when the loader is."""

import gc
import threading
import time

from titan_cpt.data.mixture import Draw
from titan_cpt.data.prefetch import Prefetcher
from titan_cpt.errors import RemoteError


class Fetched:
    """Records the ordinals that are fetched; every call with a multiple of ten fails."""

    def __init__(self):
        self.ordinals = []

    def fetch(self, draws):
        self.ordinals += [draw.ordinal for draw in draws]
        if draws[0].ordinal % 10 == 0:
            raise RemoteError("no answer")


def draws_of(number):
    return [Draw("en", number, False)] * 128  # two micro-batches ahead


def wait_for(condition):
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.005)


def prefetching():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_it_stays_a_bounded_number_of_micro_batches_ahead_and_outlives_errors():
    reader = Fetched()
    prefetcher = Prefetcher(reader, draws_of, range(20))
    seen = []
    for number in range(20):
        prefetcher.advance(number)
        upto = min(number + 2, 19)
        wait_for(lambda upto=upto: reader.ordinals and max(reader.ordinals) >= upto)
        time.sleep(0.01)
        seen.append(max(reader.ordinals) - number)

    assert max(seen) <= 2
    assert sorted(set(reader.ordinals)) == list(range(20))
    wait_for(lambda: not prefetching())


def test_micro_batches_that_were_read_meanwhile_are_not_fetched():
    reader = Fetched()
    prefetcher = Prefetcher(reader, draws_of, range(0, 1000))
    wait_for(lambda: len(set(reader.ordinals)) == 3)
    prefetcher.advance(998)
    wait_for(lambda: 999 in reader.ordinals)

    assert sorted(set(reader.ordinals)) == [0, 1, 2, 998, 999]


def test_the_thread_ends_when_the_loader_is_dropped():
    prefetcher = Prefetcher(Fetched(), draws_of, range(1000))
    assert prefetching()
    del prefetcher
    gc.collect()

    wait_for(lambda: not prefetching())
