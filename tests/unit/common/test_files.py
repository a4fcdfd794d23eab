"""Atomic writes and partial folders, beside files of a user."""

import os

import pytest

from titan_cpt.common.files import atomic_folder, write_bytes_atomically, write_text_atomically


def test_a_temporary_file_never_replaces_a_users_file(tmp_path):
    """NAME.tmp can be a file of the user, and so can a file with the name that ours would have."""
    for name in ("page.tmp", "page.html.tmp", f".page.html.{os.getpid()}-0.tmp"):
        (tmp_path / name).write_text("mine")
    write_bytes_atomically(tmp_path / "page.html", b"page")

    assert (tmp_path / "page.html").read_text() == "page"
    assert {path.read_text() for path in tmp_path.iterdir() if path.name != "page.html"} == {"mine"}
    assert len(list(tmp_path.iterdir())) == 4


def test_a_partial_folder_replaces_only_the_remains_of_an_interrupted_attempt(tmp_path):
    """A `.out.partial` without our lock file is refused; one with it is cleared; a failure leaves nothing."""
    hidden = tmp_path / ".out.partial"
    hidden.mkdir()
    (hidden / "model.safetensors").write_text("mine")
    with pytest.raises(FileExistsError, match="did not write it"), atomic_folder(tmp_path / "out"):
        pass
    assert (hidden / "model.safetensors").read_text() == "mine"

    (hidden / "titan_cpt.lock").touch()
    (hidden / "content").mkdir()
    (hidden / "content" / "half").write_text("left by a kill")

    def fail():
        with atomic_folder(tmp_path / "out") as folder:
            assert list(folder.iterdir()) == []
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (hidden / "model.safetensors").read_text() == "mine", "what is beside the content stays"
    (hidden / "model.safetensors").unlink()
    hidden.rmdir()

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("new")
    assert (tmp_path / "out" / "whole").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "elsewhere"}


def test_a_file_that_cannot_be_created_is_named_as_it_was_given(tmp_path):
    """And not the hidden file that would be renamed to it."""
    with pytest.raises(FileNotFoundError) as error:
        write_text_atomically(tmp_path / "gone" / "x.toml", "text")

    assert error.value.filename == str(tmp_path / "gone" / "x.toml")
