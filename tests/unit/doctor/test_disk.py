"""Checks of the output folder with their problems, and nothing of them stays there."""

import errno
import fcntl
import os

import pytest
from permissions import modes_count

from titan_cpt.doctor import disk


def levels(findings):
    return {finding.topic: finding.level for finding in findings}


def test_a_good_folder_has_no_problem_and_stays_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_MOST_BYTES", 1 << 20)
    found = list(disk.check_folder(tmp_path / "outputs"))
    assert levels(found).keys() == {"output folder", "rename", "file locks", "clock", "disk speed"}
    assert {finding.level for finding in found} <= {"ok", "note"}
    assert found[0].text.endswith("is writable, and will be created")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with modes_count():
            (found,) = disk.check_folder(tmp_path / "outputs")
    finally:
        tmp_path.chmod(0o755)
    assert found.level == "problem"
    assert "cannot be written" in found.text
    assert "job.output_dir" in found.remedy


def test_a_full_disk_is_a_problem_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    found = [each for each in disk.check_folder(tmp_path) if each.level == "problem"]
    assert ["No space left" in each.text for each in found] == [True]
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_a_note_with_the_mount_option(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    found = next(each for each in disk.check_folder(tmp_path) if each.topic == "file locks")
    assert found.level == "note"
    assert "-o flock" in found.remedy


def test_locks_that_a_second_process_gets_too_are_a_note(tmp_path, monkeypatch):
    """As on a file system whose locks count on one node only."""
    monkeypatch.setattr(disk, "_LOCK_AGAIN", "")
    found = next(each for each in disk.check_folder(tmp_path) if each.topic == "file locks")
    assert (found.level, found.text) == ("note", "a second process got the lock that this one holds")


@pytest.mark.parametrize(("skew", "level"), [(0.0, "ok"), (-30.0, "note"), (3600.0, "note")])
def test_a_clock_that_differs_from_the_file_servers_is_a_note(tmp_path, monkeypatch, skew, level):
    now = disk.time.time()
    monkeypatch.setattr(disk.time, "time", lambda: now + skew)
    assert levels(disk.check_folder(tmp_path))["clock"] == level


def test_a_slow_disk_is_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_MOST_BYTES", 1 << 20)
    monkeypatch.setattr(disk, "_SLOW_BYTES_PER_S", 1e15)
    assert levels(disk.check_folder(tmp_path))["disk speed"] == "note"


def test_space_is_compared_with_the_plans_checkpoints(tmp_path):
    assert [each.level for each in disk.check_space(tmp_path / "outputs", 1)] == ["ok"]
    (found,) = disk.check_space(tmp_path / "outputs", 1 << 60)
    assert found.level == "problem"
    assert "checkpoint.keep_latest_k" in found.remedy


def test_the_file_system_is_that_of_the_innermost_mount(tmp_path, monkeypatch):
    (tmp_path / "mounts").write_text(f"/dev/sda / ext4 rw\nserver:/x {tmp_path} nfs4 rw\nother {tmp_path}x lustre rw\n")
    monkeypatch.setattr(disk, "_MOUNTS", tmp_path / "mounts")
    assert [disk.file_system(path) for path in (tmp_path, tmp_path / "a", tmp_path.parent)] == ["nfs4", "nfs4", "ext4"]
