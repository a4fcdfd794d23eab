"""The block cache: whole blocks or nothing, bounded, shared, and optional."""

import os
import pickle
import resource
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.object_storage import block_cache
from titan_cpt.object_storage.block_cache import BlockCache, remove_old_blocks
from titan_cpt.object_storage.locations import CacheSettings

BLOCK = 4096


def settings(folder, blocks=16):
    return CacheSettings(str(folder), blocks * BLOCK, BLOCK)


def block(number):
    return bytes([number % 256]) * BLOCK


def fresh(cache):
    """The cache as another process sees it."""
    return BlockCache(cache._settings, cache._folder.name)


@given(st.integers(0, BLOCK), st.integers(0, BLOCK))
def test_any_part_of_a_block_is_what_was_written(tmp_path_factory, first, second):
    start, stop = sorted((first, second))
    cache = BlockCache(settings(tmp_path_factory.mktemp("cache")), "object")
    content = os.urandom(BLOCK)
    cache.write(3, content)

    assert cache.read(3, start, stop) == fresh(cache).read(3, start, stop) == content[start:stop]
    assert cache.read(2, 0, 1) is None


@pytest.mark.parametrize("position", [0, BLOCK - 1, BLOCK, BLOCK + 7])
def test_a_damaged_block_is_not_read_and_is_removed(tmp_path, position):
    cache = BlockCache(settings(tmp_path), "object")
    cache.write(0, block(1))
    path = tmp_path / "object" / "0"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)

    assert fresh(cache).read(0, 0, 10) is None
    assert not path.exists()


@pytest.mark.parametrize("size", [0, 5, 8, BLOCK])
def test_a_truncated_block_is_not_read(tmp_path, size):
    cache = BlockCache(settings(tmp_path), "object")
    cache.write(0, block(1))
    os.truncate(tmp_path / "object" / "0", size)

    assert fresh(cache).read(0, 0, 10) is None


def test_the_least_recently_used_blocks_go_first_and_the_limit_holds(tmp_path):
    """All blocks have the same size; use is marked by the time of the file."""
    cache = BlockCache(settings(tmp_path, blocks=1000), "object")
    for number in range(40):
        cache.write(number, block(number))
        os.utime(tmp_path / "object" / str(number), (1000 + number, 1000 + number))
    fresh(cache).read(0, 0, 1)  # block 0 becomes the newest

    remove_old_blocks(settings(tmp_path, blocks=20))
    left = {int(path.name) for path in (tmp_path / "object").iterdir()}
    size = sum(path.stat().st_size for path in (tmp_path / "object").iterdir())

    assert left == {0, *range(40 - len(left) + 1, 40)}
    assert 0.8 * 20 * BLOCK < size <= 0.9 * 20 * BLOCK


def test_writing_far_more_than_the_limit_keeps_the_folder_near_it(tmp_path):
    cache = BlockCache(settings(tmp_path, blocks=16), "object")
    for number in range(100):
        cache.write(number, block(number))

    assert sum(path.stat().st_size for path in (tmp_path / "object").iterdir()) <= 18 * (BLOCK + 8)
    assert fresh(cache).read(99, 0, 1) == bytes([99])


def test_files_of_killed_processes_go_and_those_of_running_ones_stay(tmp_path):
    cache = BlockCache(settings(tmp_path), "object")
    cache.write(0, block(0))
    for name, age in ((".1.old.tmp", 4000), (".1.new.tmp", 10)):
        (tmp_path / "object" / name).write_bytes(b"x")
        os.utime(tmp_path / "object" / name, (time.time() - age,) * 2)

    remove_old_blocks(settings(tmp_path))

    assert sorted(path.name for path in (tmp_path / "object").iterdir()) == [".1.new.tmp", "0"]


def test_a_full_disk_costs_the_cache_and_one_warning_and_nothing_else(tmp_path, capsys):
    cache = BlockCache(settings(tmp_path / "cache"), "object")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        for number in range(3):
            cache.write(number, block(number))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        block_cache._warned.clear()
    printed = capsys.readouterr().err

    assert cache.read(2, 0, 3) == block(2)[:3]  # the last one is in memory
    assert cache.read(1, 0, 3) is None
    assert printed.count("cannot be written (File too large)") == 1
    assert "Free space there, or set storage.cache_dir" in printed
    assert list((tmp_path / "cache" / "object").iterdir()) == []


def test_a_pickled_cache_finds_the_same_blocks_and_carries_none(tmp_path):
    cache = BlockCache(settings(tmp_path), "object")
    cache.write(5, block(5))
    pickled = pickle.dumps(cache)

    assert len(pickled) < BLOCK
    assert pickle.loads(pickled).read(5, 0, 9) == block(5)[:9]


WRITER = """
import sys
from titan_cpt.object_storage.block_cache import BlockCache
from titan_cpt.object_storage.locations import CacheSettings
cache = BlockCache(CacheSettings(sys.argv[1], 16 * 4096, 4096), "object")
for turn in range(300):
    number = turn * 7 % 60
    data = cache.read(number, 0, 4096)
    assert data is None or data == bytes([number]) * 4096, number
    if data is None:
        cache.write(number, bytes([number]) * 4096)
"""


def test_three_processes_that_write_and_remove_the_same_blocks_read_only_whole_ones(tmp_path):
    started = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)]) for _ in range(3)]

    assert [process.wait(60) for process in started] == [0, 0, 0]
