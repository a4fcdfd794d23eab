"""Restoring: the newest copy or an error, never an older checkpoint in its place."""

import shutil

import pytest
from remote_checkpoints import URL, memory, save

from titan_cpt.checkpoint.remote import restore
from titan_cpt.checkpoint.remote.copies import upload_copy
from titan_cpt.checkpoint.remote.restore import download_initial, downloaded_initial, restore_run
from titan_cpt.errors import RemoteError

STARTS = [("a", None), ("b", ("a", 4))]


@pytest.fixture(autouse=True)
def _empty():
    yield
    memory().store.clear()


def restored(run):
    return restore_run(run, URL, STARTS, misfit=lambda record: None, say=lambda text: None)


def test_storage_that_fails_during_a_restore_is_an_error_also_if_older_checkpoints_are_here(tmp_path, monkeypatch):
    """The checkpoint that stage b starts from is downloaded first: the run does not continue from it."""
    for steps in (4, 8):
        folder = save(tmp_path / "first", steps=steps)
        upload_copy(folder, f"{URL}/a/{folder.name}", before_manifest=lambda: None)
    real = restore.download_copy

    def failing(copy, folder):
        if copy.name == "a/step-00000008":
            raise RemoteError("the server does not answer")
        real(copy, folder)

    run = tmp_path / "run"
    run.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(restore, "download_copy", failing)
        with pytest.raises(RemoteError, match="continues from a checkpoint that is there"):
            restored(run)
    assert (run / "a" / "step-00000004" / "manifest.json").exists()
    memory().rm("/bucket/run/owner.json")  # of this process, which is alive
    restored(run)

    assert (run / "a" / "step-00000008" / "manifest.json").exists()


def test_initial_weights_that_were_replaced_in_storage_are_downloaded_again(tmp_path):
    """A copy that is not there any more does not stop the run: it has been downloaded."""
    url, said = f"{URL}/a/step-00000004", []
    for _ in range(2):
        folder = save(tmp_path / "first")
        upload_copy(folder, url, before_manifest=lambda: None)
        content = (folder / "index.json").read_bytes()
        for _ in range(2):
            download_initial(tmp_path, url, say=said.append)
        assert (downloaded_initial(tmp_path, url) / "index.json").read_bytes() == content
        shutil.rmtree(folder)
    memory().rm("/bucket/run/a", recursive=True)
    download_initial(tmp_path, url, say=said.append)

    assert [line.split(" ")[0] for line in said] == ["downloading", "downloading", f"{url}:"]
