"""The uploading thread: newest first, tries again, survives outages, ends on request."""

import json
import shutil
import time

import pytest
from remote_checkpoints import URL, memory, save

from titan_cpt.checkpoint.remote import uploader
from titan_cpt.checkpoint.remote.copies import list_copies
from titan_cpt.checkpoint.remote.owner import claim
from titan_cpt.checkpoint.remote.records import UploadRecords
from titan_cpt.checkpoint.remote.uploader import Uploader
from titan_cpt.errors import RemoteError

KINDS = ("stage_end", "interval")


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(uploader, "_FIRST_PAUSE_SECONDS", 0.01)
    yield
    memory().store.clear()


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"kind": "event"}\n{"kind": "tr')
    return folder


def started(run, kinds=KINDS):
    each = Uploader(run, URL, kinds, claim(URL, None, has_checkpoints=False, say=pytest.fail))
    each.start()
    return each


def finished(each):
    complete = each.wait(patience_s=10, say=lambda text: None)
    each.close()
    return complete


def names():
    return [copy.name for copy in list_copies(URL, pytest.fail)]


def test_checkpoints_of_the_chosen_kinds_are_uploaded_and_recorded(run):
    save(run, steps=4)
    save(run, steps=8, kind="stage_end")
    save(run, steps=9, kind="pre_anneal")
    each = started(run)

    assert finished(each)
    assert names() == ["a/step-00000008", "a/step-00000004"]
    assert [message.fields["url"] for message in each.messages()] == [f"{URL}/{name}" for name in names()]
    assert UploadRecords.read(run, URL).has(run / "a" / "step-00000008")
    assert memory().cat_file("/bucket/run/metrics.jsonl") == b'{"kind": "event"}\n'


def test_a_new_checkpoint_is_uploaded_when_the_thread_is_notified(run):
    each = started(run)
    save(run, steps=4)
    each.notify()
    until = time.monotonic() + 10
    while names() != ["a/step-00000004"]:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert finished(each)


def test_what_was_uploaded_is_not_uploaded_again_and_a_replaced_checkpoint_is(run):
    folder = save(run)
    assert finished(started(run))
    again = Uploader(run, URL, KINDS, None)
    assert again.pending() == []
    record = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**record, "run_step": 5}))

    assert again.pending() == [folder]


@pytest.mark.parametrize("when", ["before the files are read", "after the manifest is written"])
def test_a_checkpoint_that_training_replaces_during_its_upload_is_uploaded_again(run, monkeypatch, when):
    """The copy is then that of the new one, and only the new one counts as uploaded."""
    folder = save(run)
    real, calls = uploader.upload_copy, []

    def replaced(*arguments, **options):
        calls.append(1)
        if len(calls) > 1:
            return real(*arguments, **options)
        if when == "before the files are read":
            (folder / "index.json").write_bytes(bytes(70))
        try:
            return real(*arguments, **options)
        finally:
            shutil.rmtree(folder)
            save(run)

    monkeypatch.setattr(uploader, "upload_copy", replaced)

    assert finished(started(run))
    assert memory().cat_file("/bucket/run/a/step-00000004/manifest.json") == (folder / "manifest.json").read_bytes()


def test_a_process_that_lost_its_uploads_removes_nothing_of_the_new_owner(run):
    each = started(run)
    assert each.wait(patience_s=10, say=lambda text: None)
    save(run)
    owner = json.loads(memory().cat_file("/bucket/run/owner.json"))
    memory().pipe_file("/bucket/run/owner.json", json.dumps({**owner, "session": "other"}).encode())
    memory().pipe_file("/bucket/run/a/step-00000004/manifest.json", b"of the new owner")

    assert not each.wait(patience_s=10, say=lambda text: None)
    each.close()
    assert memory().cat_file("/bucket/run/a/step-00000004/manifest.json") == b"of the new owner"


def test_an_outage_is_reported_once_and_overcome(run, monkeypatch):
    save(run)
    real, calls = uploader.upload_copy, []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) < 4:
            raise RemoteError("no answer")
        return real(*arguments, **options)

    monkeypatch.setattr(uploader, "upload_copy", failing)
    each = started(run)

    assert finished(each)
    assert [message.event for message in each.messages()] == ["upload_failed", "upload"]


def test_a_damaged_local_checkpoint_does_not_keep_the_others_from_being_uploaded(run):
    folder = save(run, steps=8)
    save(run, steps=4)
    (folder / "index.json").write_bytes(bytes(70))
    each = started(run)

    assert finished(each)
    assert names() == ["a/step-00000004"]
    assert "so it is not uploaded" in each.messages()[0].text


def test_a_wait_without_progress_ends_and_says_what_to_do(run, monkeypatch):
    save(run)
    monkeypatch.setattr(uploader, "upload_copy", lambda *_, **__: time.sleep(60))
    each = started(run)
    said = []
    begin = time.monotonic()

    assert not each.wait(patience_s=1.3, say=said.append)
    assert time.monotonic() - begin < 5
    assert f"titan-cpt upload {run}" in said[0]
    each.close()


def test_a_process_that_lost_its_uploads_to_another_stops_writing_and_says_so(run):
    each = started(run)
    assert each.wait(patience_s=10, say=lambda text: None)
    record = json.loads(memory().cat_file("/bucket/run/owner.json"))
    memory().pipe_file("/bucket/run/owner.json", json.dumps({**record, "session": "other", "pid": 7}).encode())
    save(run)

    assert not each.wait(patience_s=10, say=lambda text: None)
    each.close()
    assert "process 7 on host" in each.messages()[-1].text
    assert names() == []
