"""Lookups and transfers, on memory:// and file://; a real S3 server is in tests/behavior/test_s3.py."""

import time

import fsspec
import pytest

from titan_cpt.errors import RemoteError
from titan_cpt.object_storage import filesystem
from titan_cpt.object_storage.filesystem import (
    find,
    list_objects,
    matching_urls,
    read_object,
    read_ranges,
    remote_errors,
    remove_object,
    stat,
    upload_file,
    write_object,
)


@pytest.fixture(params=["memory", "file"])
def bucket(request, tmp_path):
    yield "memory://bucket" if request.param == "memory" else f"file://{tmp_path}/bucket"
    fsspec.filesystem("memory").store.clear()


def test_what_is_written_is_found_listed_read_and_removed(bucket, tmp_path):
    (tmp_path / "local").write_bytes(b"0123456789")
    upload_file(tmp_path / "local", f"{bucket}/a/x.bin")
    write_object(f"{bucket}/a/b/y.bin", b"abc")

    assert find(f"{bucket}/a/x.bin").size == stat(f"{bucket}/a/x.bin").size == 10
    assert list_objects(f"{bucket}/a") == {"x.bin": 10, "b/y.bin": 3}
    assert matching_urls(f"{bucket}/a/*.bin") == [f"{bucket}/a/x.bin"]
    assert read_ranges(f"{bucket}/a/x.bin", [(0, 2), (7, 10)]) == [b"01", b"789"]
    assert read_object(f"{bucket}/a/b/y.bin") == b"abc"
    remove_object(f"{bucket}/a/x.bin")
    remove_object(f"{bucket}/a/x.bin")
    assert find(f"{bucket}/a/x.bin") is None


def test_what_is_missing_is_none_or_empty_or_an_error_that_names_it(bucket):
    assert find(f"{bucket}/none") is None
    assert read_object(f"{bucket}/none") is None
    assert list_objects(f"{bucket}/none") == {}
    assert matching_urls(f"{bucket}/none*") == []
    with pytest.raises(RemoteError, match=r"bucket/none: no such object\. Check the name"):
        stat(f"{bucket}/none")


def test_a_folder_is_no_object(bucket):
    write_object(f"{bucket}/a/b/y.bin", b"abc")
    assert find(f"{bucket}/a/b") is None


def test_the_version_changes_with_the_content(bucket):
    write_object(f"{bucket}/x", b"abc")
    before = find(f"{bucket}/x")
    write_object(f"{bucket}/x", b"abd")
    assert find(f"{bucket}/x") != before


def test_a_range_beyond_the_end_is_an_error(bucket):
    write_object(f"{bucket}/x", b"abc")
    with pytest.raises(RemoteError, match="bytes 1 to 9 were requested, and 2 of them came"):
        read_ranges(f"{bucket}/x", [(1, 9)])


def test_a_local_file_that_vanishes_is_no_error_of_the_storage(bucket, tmp_path):
    with pytest.raises(FileNotFoundError):
        upload_file(tmp_path / "none", f"{bucket}/x")


class NoCredentialsError(Exception):
    """Named like botocore's."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError("Forbidden"), r"access is refused \(Forbidden\): .* AWS_PROFILE"),
        (NoCredentialsError("none"), "credentials are missing or wrong"),
        (TimeoutError("late"), "does not answer or is busy .TimeoutError: late., also after several tries"),
        (OSError(16, "Slow down."), "does not answer or is busy"),
        (ConnectionResetError("gone"), "does not answer"),
        (OSError(5, "odd"), "OSError: .Errno 5. odd. If this is transient, run the same command again"),
    ],
)
def test_an_error_of_a_client_library_becomes_a_message_with_what_to_do(error, message):
    with pytest.raises(RemoteError, match=message), remote_errors("s3://bucket/x"):
        raise error


def test_a_read_that_waits_long_is_reported_once_with_rank_and_url(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(filesystem, "_SLOW_SECONDS", 0.05)
    monkeypatch.setattr(filesystem, "_last_report", -1e9)
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/slow/x", b"abc")
    real = type(memory).cat_ranges

    def slow(*arguments, **options):
        time.sleep(0.3)
        return real(*arguments, **options)

    monkeypatch.setattr(type(memory), "cat_ranges", slow)
    for _ in range(2):
        assert filesystem.read_ranges("memory://slow/x", [(0, 3)]) == [b"abc"]
    memory.rm("/slow", recursive=True)

    printed = capsys.readouterr().err
    assert printed.count("rank 3: waiting for memory://slow/x for 0 s") == 1
