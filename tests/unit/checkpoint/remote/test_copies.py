"""A copy is complete and verified, or has no manifest; what is downloaded is what was saved."""

import hashlib
import json
import os
import shutil
from contextlib import suppress

import pytest
from remote_checkpoints import URL, damage, memory, save

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.remote import copies
from titan_cpt.checkpoint.remote.copies import (
    download_copy,
    list_copies,
    read_copy,
    remove_incomplete,
    upload_copy,
    verify_copy,
)
from titan_cpt.errors import CheckpointError, RemoteError
from titan_cpt.object_storage import filesystem

COPY = f"{URL}/a/step-00000004"
PATH = "/bucket/run/a/step-00000004"
SHARD = "rank-00000-0.safetensors"


@pytest.fixture(autouse=True)
def _empty_memory():
    yield
    memory().store.clear()


def upload(folder, url=COPY, **options):
    return upload_copy(folder, url, before_manifest=lambda: None, **options)


def test_a_download_of_an_upload_is_the_checkpoint(tmp_path):
    folder = save(tmp_path / "run")
    assert upload(folder) == (folder / "manifest.json").read_bytes()
    verify_copy(read_copy(COPY))
    download_copy(read_copy(COPY), tmp_path / "other" / "a" / "step-00000004")

    for path in folder.iterdir():
        assert (tmp_path / "other" / "a" / "step-00000004" / path.name).read_bytes() == path.read_bytes()


def test_copies_are_listed_newest_first_by_stage_and_step(tmp_path):
    for stage, index, steps in (("b", 1, 2), ("a", 0, 8), ("a", 0, 16)):
        folder = save(tmp_path / "run", stage, steps, index=index)
        upload(folder, f"{URL}/{stage}/{folder.name}")
    memory().pipe_file(f"{PATH}/{SHARD}", b"without manifest")

    found = [copy.name for copy in list_copies(URL, pytest.fail)]
    assert found == ["b/step-00000002", "a/step-00000016", "a/step-00000008"]


def test_the_manifest_is_written_last_and_not_if_the_check_before_it_fails(tmp_path):
    def refuse():
        assert set(memory().find(PATH)) == {f"{PATH}/{SHARD}", f"{PATH}/index.json"}
        raise RemoteError("no")

    with pytest.raises(RemoteError):
        upload_copy(save(tmp_path / "run"), COPY, before_manifest=refuse)

    assert list_copies(URL, pytest.fail) == []


def test_an_interrupted_upload_continues_with_what_is_missing(tmp_path, monkeypatch):
    folder = save(tmp_path / "run")
    with suppress(RemoteError):
        upload_copy(folder, COPY, before_manifest=lambda: (_ for _ in ()).throw(RemoteError("lost")))
    memory().rm_file(f"{PATH}/index.json")
    uploaded = []
    monkeypatch.setattr(copies, "upload_file", lambda path, *rest: uploaded.append(path.name) or real(path, *rest))
    real = filesystem.upload_file
    upload(folder)

    assert uploaded == ["index.json"]
    verify_copy(read_copy(COPY))


@pytest.mark.parametrize("name", [SHARD, "index.json"])
def test_a_damaged_copy_is_replaced_also_if_its_manifest_is_right(tmp_path, name):
    """As after a kill between the manifest and uploads.json: only a check of the content may count as verified."""
    folder = save(tmp_path / "run")
    upload(folder)
    damage(f"{PATH}/{name}")
    with pytest.raises(CheckpointError, match=f"{name}: its content changed"):
        verify_copy(read_copy(COPY))
    upload(folder)

    verify_copy(read_copy(COPY))


def test_another_checkpoint_of_the_same_name_is_replaced_and_never_mixed(tmp_path):
    upload(save(tmp_path / "run"))
    folder = save(tmp_path / "again")
    seen = []
    upload_copy(folder, COPY, before_manifest=lambda: seen.append(memory().exists(f"{PATH}/manifest.json")))

    assert seen == [False]
    assert read_copy(COPY).manifest == manifest.read(folder)
    verify_copy(read_copy(COPY))


def test_what_the_storage_changed_on_the_way_is_an_error(tmp_path, monkeypatch):
    real = filesystem.upload_file

    def corrupting(path, url, *rest):
        real(path, url, *rest)
        damage(f"{PATH}/{path.name}")

    monkeypatch.setattr(copies, "upload_file", corrupting)
    with pytest.raises(RemoteError, match="has other content than was uploaded"):
        upload(save(tmp_path / "run"))
    assert list_copies(URL, pytest.fail) == []


def test_a_local_file_that_changed_since_it_was_saved_is_not_uploaded(tmp_path):
    folder = save(tmp_path / "run")
    content = bytearray((folder / SHARD).read_bytes())
    content[7] ^= 1
    (folder / SHARD).write_bytes(content)

    with pytest.raises(CheckpointError, match=r"its checksum differs., so it is not uploaded"):
        upload(folder)
    assert list_copies(URL, pytest.fail) == []


def test_a_checkpoint_that_training_removes_meanwhile_leaves_nothing(tmp_path):
    folder = save(tmp_path / "run")
    with pytest.raises(FileNotFoundError):
        upload_copy(folder, COPY, before_manifest=lambda: None, on_progress=lambda count: shutil.rmtree(folder))
    remove_incomplete(COPY)
    assert memory().find("/bucket") == []

    upload(save(tmp_path / "run"))
    remove_incomplete(COPY)
    verify_copy(read_copy(COPY))


@pytest.mark.parametrize("fault", ["damage", "truncate", "remove"])
def test_a_damaged_copy_is_not_downloaded_and_leaves_no_folder(tmp_path, fault):
    upload(save(tmp_path / "run"))
    copy = read_copy(COPY)
    if fault == "damage":
        damage(f"{PATH}/{SHARD}")
    elif fault == "truncate":
        memory().pipe_file(f"{PATH}/{SHARD}", b"short")
    else:
        memory().rm_file(f"{PATH}/{SHARD}")
    folder = tmp_path / "other" / "a" / "step-00000004"

    with pytest.raises(CheckpointError, match=f"{SHARD}: "):
        download_copy(copy, folder)
    assert not folder.exists()
    with pytest.raises(CheckpointError, match=f"{SHARD}: "):
        verify_copy(copy)


@pytest.mark.parametrize("name", ["../../evil", "/evil", "a/../../evil", ".hidden", "manifest.json", "", "a\\b"])
def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path, name):
    upload(save(tmp_path / "run"))
    record = json.loads(memory().cat_file(f"{PATH}/manifest.json"))
    record["files"][name] = {"bytes": 4, "xxh3_128": "0" * 32}
    memory().pipe_file(f"{PATH}/manifest.json", json.dumps(record).encode())
    found = []

    with pytest.raises(CheckpointError, match="is not a file of this folder"):
        read_copy(COPY)
    assert list_copies(URL, found.append) == []
    assert "is not a file of this folder" in found[0]


def test_a_url_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"memory://bucket/x: has no manifest.json, so it is not a checkpoint"):
        read_copy("memory://bucket/x")


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_digest_of_a_large_file_is_that_of_s3s_multipart_uploads(tmp_path, monkeypatch, parts):
    """S3's rule: one part: MD5; N parts: the MD5 of their MD5s, "-" and N. Below two whole parts there is only one."""
    monkeypatch.setattr(copies, "PART_BYTES", 1000)
    content = os.urandom(1000 * (parts - 1) + 999)
    (tmp_path / "x").write_bytes(content)
    pieces = [content[at : at + 1000] for at in range(0, len(content), 1000)]
    joined = hashlib.md5(b"".join(hashlib.md5(piece).digest() for piece in pieces)).hexdigest()

    md5, _, size = copies._digests(tmp_path / "x")

    assert size == len(content)
    assert md5 == (f"{joined}-{parts}" if parts > 2 else hashlib.md5(content).hexdigest())
