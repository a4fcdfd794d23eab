"""uploads.json: what was uploaded to each URL, under the run folder's id there."""

import json

import pytest
from remote_checkpoints import URL, memory, save

from titan_cpt.checkpoint.remote.records import UploadRecords
from titan_cpt.checkpoint.remote.uploader import claim_for

OTHER = "memory://other/run"


@pytest.fixture(autouse=True)
def _empty():
    yield
    memory().store.clear()


def session(run, url):
    """Begin and end a session as the owner of a URL; returns the owner's id."""
    owner = claim_for(run, url, UploadRecords.read(run, url), say=pytest.fail)
    owner.renew(done=True)
    return owner.id


def test_a_run_that_uploads_elsewhere_for_a_while_may_return(tmp_path):
    """As after `titan-cpt upload RUN --to ANOTHER`; the uploads to the first URL are remembered."""
    folder = save(tmp_path)
    first = session(tmp_path, URL)
    records = UploadRecords.read(tmp_path, URL)
    records.add(folder, (folder / "manifest.json").read_bytes())
    session(tmp_path, OTHER)

    assert not UploadRecords.read(tmp_path, OTHER).has(folder)
    assert session(tmp_path, URL) == first
    assert UploadRecords.read(tmp_path, URL).has(folder)


@pytest.mark.parametrize("content", ["", "[]", '{"to": 1}', '{"to": "memory://bucket/run", "elsewhere": 3}'])
def test_a_damaged_file_has_no_uploads(tmp_path, content):
    (tmp_path / "uploads.json").write_text(content)

    assert UploadRecords.read(tmp_path, URL).uploaded == {}


def test_a_file_of_an_older_version_is_read(tmp_path):
    (tmp_path / "uploads.json").write_text(json.dumps({"to": URL, "owner": "7", "uploaded": {"a/step-00000004": "x"}}))
    records = UploadRecords.read(tmp_path, URL)

    assert (records.owner, records.uploaded) == ("7", {"a/step-00000004": "x"})
