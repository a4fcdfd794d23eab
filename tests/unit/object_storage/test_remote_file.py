"""A remote file gives the bytes of the object that was opened, or an error."""

import os
import pickle

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from remote_data import Counted, cache_in

from titan_cpt.errors import RemoteError
from titan_cpt.object_storage.locations import RemotePath
from titan_cpt.object_storage.remote_file import RemoteFile, read_remote_head

CONTENT = os.urandom(50_000)
SPANS = st.lists(st.tuples(st.integers(0, 60_000), st.integers(0, 20_000)), max_size=6)


@pytest.fixture
def remote(tmp_path):
    fsspec.filesystem("memory").pipe_file("/b/data", CONTENT)
    return RemotePath("memory://b/data", cache_in(tmp_path))


@given(SPANS, st.integers(4096, 70_000))
def test_every_range_is_that_of_the_object_whatever_the_block_size(tmp_path_factory, ranges, block_bytes):
    folder = tmp_path_factory.mktemp("cache")
    fsspec.filesystem("memory").pipe_file("/b/data", CONTENT)
    file = RemoteFile(RemotePath("memory://b/data", cache_in(folder, block_bytes=block_bytes)))
    spans = [(start, start + count) for start, count in ranges]

    assert [file.read(start, count) for start, count in ranges] == [CONTENT[a:b] for a, b in spans]
    assert file.read_ranges(spans) == [CONTENT[a:b] for a, b in spans]


def test_a_block_is_fetched_once_by_all_processes(remote):
    file = RemoteFile(remote)
    with Counted() as first:
        file.fetch([(0, len(CONTENT))])
    with Counted() as later:
        assert pickle.loads(pickle.dumps(file)).read(0, len(CONTENT)) == CONTENT
        assert RemoteFile(remote).read(100, 9000) == CONTENT[100:9100]

    assert (first.bytes, later.ranges) == (len(CONTENT), 0)


def test_a_few_bytes_of_a_large_file_are_read_without_fetching_its_blocks(tmp_path):
    fsspec.filesystem("memory").pipe_file("/b/large", bytes(1 << 20))
    file = RemoteFile(RemotePath("memory://b/large", cache_in(tmp_path, block_bytes=1 << 18)))
    with Counted() as counted:
        file.read_ranges([(0, 16), (500_000, 500_016)])

    assert counted.bytes == 32


@pytest.mark.parametrize(
    "content", [os.urandom(50_000), os.urandom(50_001), CONTENT[:100]], ids=["same size", "one byte more", "shorter"]
)
def test_an_object_that_was_replaced_is_an_error_and_not_a_mixture(remote, content):
    """Blocks that were read before remain those of the old object; no byte of the new one is returned."""
    file = RemoteFile(remote)
    assert file.read(0, 4096) == CONTENT[:4096]
    fsspec.filesystem("memory").pipe_file("/b/data", content)

    assert file.read(10, 100) == CONTENT[10:110]
    with pytest.raises(RemoteError, match=r"memory://b/data: the object was replaced|of them came"):
        file.read(8192, 4096)
    assert RemoteFile(remote).read(0, 10**6) == content


def test_a_removed_object_is_an_error(remote):
    file = RemoteFile(remote)
    fsspec.filesystem("memory").rm_file("/b/data")

    with pytest.raises(RemoteError, match="does not exist any more"):
        file.read(0, 10)
    with pytest.raises(RemoteError, match="memory://b/data: no such object"):
        RemoteFile(remote)


def test_the_head_is_64_kib_or_the_whole_file(remote):
    assert read_remote_head(remote) == CONTENT
    fsspec.filesystem("memory").pipe_file("/b/data", bytes(100_000))
    assert read_remote_head(remote) == bytes(65_536)
