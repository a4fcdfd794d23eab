"""The cache of packing indices: built once, by one process, and again if it is damaged."""

import os
import threading
import time

import numpy as np
import pytest
from packed import pack_plainly
from remote_data import cache_in
from token_formats import write_pair, write_raw

from titan_cpt.common.file_lock import FileLock
from titan_cpt.data.formats.token_files import TokenFiles, resolve_paths
from titan_cpt.data.packing.packed_documents import PackedDocuments
from titan_cpt.errors import AccessError
from titan_cpt.object_storage.block_cache import remove_old_blocks
from titan_cpt.object_storage.locations import CacheSettings

SIZES = (7, 0, 300, 1, 1, 371)


def documents(tmp_path, name="pair", sizes=SIZES):
    write_pair(tmp_path / name, sizes)
    return described(TokenFiles((str(tmp_path / name),), cache=cache_in(tmp_path)))


def described(files):
    return PackedDocuments("datasets.x.train", files, resolve_paths(files), 256)


def indices(tmp_path):
    return sorted((tmp_path / "cache" / "packing").glob("*.pack"))


def test_the_index_is_built_once_for_every_length_and_found_by_other_runs(tmp_path):
    lines = []
    index = documents(tmp_path).index(64, log=lines.append)
    assert [[tuple(p) for p in index.pieces(k)] for k in range(index.counts.sequences)] == pack_plainly(SIZES, 64)
    assert "sequences of 64 tokens; the index is kept as" in lines[0]
    assert "6 documents in 11 sequences, 96.59% full, 2 documents cut" in lines[1]

    lines.clear()
    copied = documents(tmp_path, "copied")
    assert copied.index(64, log=lines.append).path == index.path
    assert not lines
    copied.index(32, log=lines.append)
    documents(tmp_path, "other", (8, 0, 299, 1, 1, 371)).index(64, log=lines.append)
    assert len(indices(tmp_path)) == 3


def test_counting_writes_nothing_and_agrees_with_the_index(tmp_path):
    lines = []
    these = documents(tmp_path)
    counted = these.counts(64, log=lines.append)
    assert not (tmp_path / "cache").exists()
    assert not lines

    assert these.index(64, log=lines.append).counts == counted == these.counts(64, log=lines.append)


def test_counting_raw_files_builds_their_index_because_it_reads_them(tmp_path):
    files = TokenFiles(
        (str(write_raw(tmp_path / "a.bin", tokens=[1, 2, 256, 4, 5, 6, 256, 8])),),
        "raw",
        "uint16",
        cache=cache_in(tmp_path),
    )
    lines = []
    counts = described(files).counts(4, log=lines.append)

    assert (counts.documents, counts.sequences) == (3, 2)
    assert len(indices(tmp_path)) == 1
    lines.clear()
    assert described(files).counts(4, log=lines.append) == counts
    assert not lines


@pytest.mark.parametrize("damage", ["truncated", "changed", "foreign"])
def test_a_damaged_or_foreign_index_is_built_again_with_a_note(tmp_path, damage):
    lines = []
    these = documents(tmp_path)
    good = these.index(64, log=lines.append)
    content = good.path.read_bytes()
    if damage == "truncated":
        good.path.write_bytes(content[:-100])
    elif damage == "changed":
        good.path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    else:
        other = documents(tmp_path, "other", (679, 1)).index(64, log=lines.append)
        other.path.replace(good.path)
    lines.clear()
    again = these.index(64, log=lines.append)

    assert f"datasets.x.train: {good.path}: " in lines[0]
    assert lines[0].endswith("it is built again")
    assert good.path.read_bytes() == content
    assert again.pieces(0) == good.pieces(0)
    assert these.counts(64, log=lines.append) == good.counts


def test_remains_of_a_killed_process_are_removed(tmp_path):
    these = documents(tmp_path)
    path = these.index(64, log=lambda line: None).path
    remains = path.with_name(f".{path.name[:40]}.99999-0.tmp")
    remains.write_bytes(b"half")
    os.utime(remains, (time.time() - 4000,) * 2)
    path.unlink()
    these.index(64, log=lambda line: None)

    assert not remains.exists()


def test_building_removes_the_indices_that_no_run_has_opened_for_a_quarter_of_a_year(tmp_path):
    """Opening an index marks it as used, however old it is."""
    these, days = documents(tmp_path), 86_400
    paths = {seq_len: these.index(seq_len, log=lambda line: None).path for seq_len in (64, 32, 16)}
    for seq_len, age in ((64, 91 * days), (32, 89 * days), (16, 91 * days)):
        os.utime(paths[seq_len], (time.time() - age,) * 2)
    these.index(16, log=lambda line: None)
    new = these.index(8, log=lambda line: None).path

    assert indices(tmp_path) == sorted([paths[32], paths[16], new])


def test_a_process_waits_for_the_one_that_builds(tmp_path):
    """fcntl locks are between processes, so a forked one holds the lock here."""
    lines = []
    these = documents(tmp_path)
    path = these.index(64, log=lines.append).path
    content = path.read_bytes()
    path.unlink()
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        lock = FileLock(path.with_suffix(".lock"))
        lock.acquire()
        os.write(go, b"x")
        time.sleep(1.0)
        path.write_bytes(content)
        os._exit(0)
    os.read(ready, 1)
    lines.clear()
    found = these.index(64, log=lines.append)
    os.waitpid(child, 0)
    os.close(ready)
    os.close(go)

    assert len(lines) == 1
    assert f"waits for its packing index, which process {child} on host" in lines[0]
    assert found.counts.sequences == 11


def test_a_cache_that_cannot_be_written_is_an_error_that_names_the_key(tmp_path):
    (tmp_path / "cache").write_text("a file")

    with pytest.raises(AccessError, match=r"its packing index .* cannot be written: .*storage.cache_dir"):
        documents(tmp_path).index(64, log=lambda line: None)


def test_the_limit_of_the_block_cache_does_not_remove_indices(tmp_path):
    path = documents(tmp_path).index(64, log=lambda line: None).path
    blocks = tmp_path / "cache" / "object"
    blocks.mkdir()
    (blocks / "0").write_bytes(bytes(4096))
    remove_old_blocks(CacheSettings(str(tmp_path / "cache"), 16, 4096))

    assert path.exists()
    assert not (blocks / "0").exists()


def test_threads_of_one_process_may_build_the_same_index(tmp_path):
    """A POSIX lock does not separate them: each writes the same file under a name of its own."""
    these = documents(tmp_path, sizes=tuple(np.full(34, 20)))
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(these.index(50, log=lambda line: None))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {index.counts.sequences for index in results} == {17}
