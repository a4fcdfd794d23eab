"""One run folder and one process write to a URL; a dead one is replaced, a living one is not."""

import json
import os
import threading
import time

import pytest
from remote_checkpoints import URL, memory

from titan_cpt.checkpoint.remote import owner
from titan_cpt.checkpoint.remote.owner import TakenOverError, claim
from titan_cpt.errors import CheckpointError

PATH = "/bucket/run/owner.json"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(owner, "_PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(owner, "_POLL_SECONDS", 0.02)
    yield
    memory().store.clear()


def begin(known=None, has_checkpoints=False, said=None):
    return claim(URL, known, has_checkpoints=has_checkpoints, say=(said if said is not None else []).append)


def pretend(**changes):
    """Change the record, as if another process had written it."""
    memory().pipe_file(PATH, json.dumps({**json.loads(memory().cat_file(PATH)), **changes}).encode())


def test_the_first_run_becomes_the_owner_and_keeps_its_id_over_restarts():
    first = begin()
    first.renew(done=True)
    again = begin(first.id, has_checkpoints=True)

    assert again.id == first.id != again.session
    assert first.session != again.session


def test_a_run_with_checkpoints_of_its_own_is_refused_where_another_one_uploads():
    begin().renew(done=True)
    with pytest.raises(CheckpointError, match=r"holds the uploads of another run folder .* move this folder away"):
        begin("other", has_checkpoints=True)
    with pytest.raises(CheckpointError, match="holds the uploads of another run folder"):
        begin(None, has_checkpoints=True)


def test_a_run_on_an_empty_disk_takes_over_and_the_old_owner_is_refused():
    first = begin()
    pretend(pid=2**22 + 1)  # there is no such process
    second = begin(has_checkpoints=False)

    assert second.id != first.id
    with pytest.raises(TakenOverError, match="has taken over these uploads"):
        first.renew()
    with pytest.raises(TakenOverError):
        first.require()
    second.require()


def test_a_process_on_another_machine_that_renews_its_session_is_not_replaced():
    begin()
    pretend(host="elsewhere")
    stop = threading.Event()

    def renewing():
        while not stop.wait(0.05):
            pretend(renewed=time.time())

    thread = threading.Thread(target=renewing)
    thread.start()
    try:
        with pytest.raises(CheckpointError, match=r"process .* on host elsewhere is writing uploads there now"):
            begin()
    finally:
        stop.set()
        thread.join()


def test_a_process_on_another_machine_that_is_silent_is_replaced_after_a_wait():
    begin()
    pretend(host="elsewhere")
    said = []
    begin(said=said).require()

    assert "waiting up to 0 s to see whether it still runs" in said[0]


def test_a_process_that_was_silent_for_long_or_has_ended_is_replaced_at_once():
    begin()
    for changes in ({"host": "elsewhere", "renewed": time.time() - 10_000}, {"host": "elsewhere", "done": True}):
        pretend(**changes)
        said = []
        begin(said=said)
        assert said == []


def test_this_machines_processes_are_known(monkeypatch):
    begin()
    pretend(pid=os.getppid())
    said = []
    begin(said=said)
    assert len(said) == 1  # it exists, and is watched


def test_a_damaged_owner_file_is_an_error_that_names_it():
    memory().pipe_file(PATH, b"{")
    with pytest.raises(CheckpointError, match=r"owner.json: damaged. If no other run writes to"):
        begin()
