"""Token files in object storage give what their local copies give: windows, counts, fingerprints, errors."""

import pickle
from dataclasses import replace

import fsspec
import numpy as np
import pytest
import training
from remote_data import Counted, cache_in, copy_to_memory
from token_formats import CUT, SEQ_LEN, STREAMS, TOKENS, VOCAB, write_all, write_pair

from titan_cpt.data.formats.token_files import count_source, open_source, resolve_paths
from titan_cpt.data.inventory import take_inventory
from titan_cpt.errors import DataError, RemoteError

pytestmark = training.THEIR_WARNINGS_IGNORED
FORMATS = ("pair", *STREAMS, *CUT)


def remote_copy(files, folder, tmp_path):
    """The same files, described by URLs of copies in memory://."""
    bucket = copy_to_memory(folder, "data")
    spec = tuple(entry.replace(str(folder), bucket) for entry in files.spec)
    return replace(files, spec=spec, cache=cache_in(tmp_path))


@pytest.fixture(autouse=True)
def _empty_memory():
    yield
    fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize("name", FORMATS)
def test_windows_counts_and_fingerprint_are_those_of_the_local_copy(tmp_path, name):
    """Also of a pickled source, with the windows fetched in advance, and read from a cache that is full already."""
    (tmp_path / "local").mkdir()
    local = write_all(tmp_path / "local")[name]
    remote = remote_copy(local, tmp_path / "local", tmp_path)
    here, there = open_source(local, VOCAB), open_source(remote, VOCAB)
    numbers = range(here.windows(SEQ_LEN))
    expected = [here.window(number, SEQ_LEN).tolist() for number in numbers]
    there.fetch(list(numbers), SEQ_LEN)
    with Counted() as counted:
        found = [there.window(number, SEQ_LEN).tolist() for number in numbers]
        again = pickle.loads(pickle.dumps(there))
        assert [again.window(number, SEQ_LEN).tolist() for number in numbers] == expected

    assert found == expected
    assert counted.ranges == 0
    assert there.fingerprint() == here.fingerprint() == open_source(remote, VOCAB).fingerprint()
    assert count_source(remote, SEQ_LEN) == count_source(local, SEQ_LEN)
    assert (here.is_remote, there.is_remote) == (False, True)


def test_globs_and_lists_name_remote_files_in_the_order_of_local_ones(tmp_path):
    (tmp_path / "local").mkdir()
    local = write_all(tmp_path / "local")["shards"]
    remote = remote_copy(local, tmp_path / "local", tmp_path)
    names = [path.name for path in resolve_paths(local)]

    assert [path.name for path in resolve_paths(remote)] == names == sorted(names)
    assert len(names) == 3
    listed = tuple(str(path) for path in resolve_paths(remote))
    assert resolve_paths(replace(remote, spec=listed)) == resolve_paths(remote)


def test_an_object_that_is_named_twice_is_refused(tmp_path):
    (tmp_path / "local").mkdir()
    remote = remote_copy(write_all(tmp_path / "local")["shards"], tmp_path / "local", tmp_path)
    first = str(resolve_paths(remote)[0])

    with pytest.raises(DataError, match=r"names memory://data/shard-0-of-3.bin a second time"):
        resolve_paths(replace(remote, spec=(*remote.spec, first)))


def test_counting_reads_heads_only_however_large_the_file_is(tmp_path):
    """10 million tokens, 20 MB: the header and the last entry of the index, about a hundredth of it."""
    (tmp_path / "local").mkdir()
    write_pair(tmp_path / "local" / "large", sizes=[1000] * 10_000, tokens=np.tile(TOKENS, 14_706)[:10_000_000])
    files = replace(write_all(tmp_path / "local")["pair"], spec=(str(tmp_path / "local" / "large"),))
    remote = replace(remote_copy(files, tmp_path / "local", tmp_path), cache=cache_in(tmp_path, block_bytes=2 << 20))
    with Counted() as counted:
        assert count_source(remote, SEQ_LEN).tokens == 10_000_000
    assert counted.bytes < 250_000


def test_a_remote_pair_of_which_a_file_is_damaged_is_refused_on_open(tmp_path):
    (tmp_path / "local").mkdir()
    remote = remote_copy(write_all(tmp_path / "local")["pair"], tmp_path / "local", tmp_path)
    memory = fsspec.filesystem("memory")
    whole = memory.cat_file("/data/pair.bin")
    memory.pipe_file("/data/pair.bin", whole[:-2])
    with pytest.raises(DataError, match=r"memory://data/pair.idx: sequence .* of the .bin"):
        open_source(remote, VOCAB)

    memory.pipe_file("/data/pair.bin", whole[:-2] + b"\xff\xff")
    with pytest.raises(DataError, match=r"memory://data/pair.bin: token 679 has id 65535; allowed are ids from 0"):
        open_source(remote, VOCAB)


def test_an_object_that_changes_after_it_was_opened_is_an_error(tmp_path):
    (tmp_path / "local").mkdir()
    remote = remote_copy(write_all(tmp_path / "local")["pair"], tmp_path / "local", tmp_path)
    source = open_source(replace(remote, cache=cache_in(tmp_path, blocks=16)), None)
    fsspec.filesystem("memory").pipe_file("/data/pair.bin", bytes(len(TOKENS) * 2))
    for path in (tmp_path / "cache").rglob("*"):
        path.unlink() if path.is_file() else None
    with pytest.raises(RemoteError, match="the object was replaced since this run opened it"):
        pickle.loads(pickle.dumps(source)).window(0, SEQ_LEN)


def config_with(tmp_path, **datasets):
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    return training.config_of(training.changed(raw, datasets=datasets))


def test_a_missing_object_is_an_error_that_names_the_key(tmp_path):
    config = config_with(tmp_path, en={"train": "memory://data/none"})

    with pytest.raises(
        RemoteError, match=r"datasets.en.train: memory://data/none: has no .bin and .idx in object stor"
    ):
        take_inventory(config)


def test_the_inventory_is_that_of_local_data_with_a_note_on_what_is_sampled(tmp_path):
    local = config_with(tmp_path)
    bucket = copy_to_memory(tmp_path, "data")
    remote = config_with(tmp_path, en={"train": f"{bucket}/en", "validation": f"{bucket}/en-validation"})
    here, there = take_inventory(local), take_inventory(remote)

    assert there.tokens == here.tokens
    assert there.validation_tokens == here.validation_tokens
    assert "datasets.en.train, datasets.en.validation: in object storage: before" in "\n".join(there.notes)


def test_training_and_validation_that_name_the_same_object_are_refused(tmp_path):
    training.write_languages(tmp_path)
    bucket = copy_to_memory(tmp_path, "data")
    config = config_with(tmp_path, en={"train": f"{bucket}/e?", "validation": f"{bucket}/en"})

    with pytest.raises(DataError, match=r"datasets.en.train: includes memory://data/en.bin, which .* measures"):
        take_inventory(config)


def test_text_in_object_storage_is_not_token_data(tmp_path):
    with pytest.raises(DataError, match=r"memory://data/x.jsonl is text, not tokens"):
        take_inventory(config_with(tmp_path, en={"train": "memory://data/x.jsonl"}))


def test_data_that_is_to_be_prepared_has_a_local_prefix(tmp_path):
    with pytest.raises(Exception, match="with source, train and validation must be local prefixes"):
        config_with(tmp_path, en={"train": "s3://data/x", "source": {"text": "x.txt"}})
