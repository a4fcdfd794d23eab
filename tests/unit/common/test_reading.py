"""Files of an earlier run: missing, damaged, or unreadable, which is not damage."""

import errno
import io
import json
import os
from pathlib import Path

import pytest
from permissions import modes_count

from titan_cpt.common.reading import is_there, matching, read_text
from titan_cpt.data.prepare.provenance import tokenizer_provenance
from titan_cpt.data.prepare.shards import finished_counts
from titan_cpt.errors import AccessError, DataError
from titan_cpt.evaluation.scores import read_score


@pytest.fixture
def locked_away(tmp_path):
    """A file in a folder without permissions."""
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "file").write_text("text")
    (tmp_path / "closed").chmod(0)
    yield tmp_path / "closed" / "file"
    (tmp_path / "closed").chmod(0o755)


def test_a_file_without_read_permission_is_neither_missing_nor_damaged(tmp_path):
    """Mode 000 is an AccessError; a missing file, a file for a folder and a folder for a file are not."""
    (tmp_path / "file").write_text("text")
    (tmp_path / "file").chmod(0)
    with modes_count(), pytest.raises(AccessError, match=r"file: cannot be read: Permission denied.*may be intact"):
        read_text(tmp_path / "file")
    (tmp_path / "file").chmod(0o644)

    assert read_text(tmp_path / "file") == "text"
    for absent in ("none", "none/below", "file/below"):
        with pytest.raises(FileNotFoundError):
            read_text(tmp_path / absent)
    for no_file in (tmp_path, tmp_path / ("n" * 300)):
        with pytest.raises(ValueError, match=r"name|directory"):
            read_text(no_file)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EPERM, errno.ETIMEDOUT])
def test_an_io_error_is_not_damage(tmp_path, monkeypatch, number):
    """A stale network mount, a bad sector: the file may be intact."""
    (tmp_path / "file").write_text("text")

    def refused(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(io, "open", refused)
    with pytest.raises(AccessError, match=os.strerror(number)):
        read_text(tmp_path / "file")


def test_a_file_in_a_folder_without_permission_is_not_missing(locked_away):
    """`Path.glob` silently omits it, and os.path.exists returns False."""
    root = locked_away.parents[1]
    with modes_count():
        assert list(root.glob("*/file")) == []
        assert not os.path.exists(locked_away)
        with pytest.raises(AccessError, match=r"closed.*cannot be read: Permission denied"):
            matching(root, "*", "file")
        with pytest.raises(AccessError, match="Permission denied"):
            is_there(locked_away)

    assert not is_there(root / "none" / "file")
    assert not is_there(root / ("n" * 300))


def test_matching_finds_the_paths_that_glob_finds(tmp_path):
    """Level by level, sorted; files on the way and a missing folder are skipped."""
    for name in (
        "b/step-2/m",
        "a/step-1/m",
        "a/step-1/other",
        "a/step-3/other",
        "a/stop-1/m",
        "step-1/m",
        ".h/step-1/m",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")

    assert matching(tmp_path, "*", "step-*", "m") == [
        tmp_path / ".h/step-1/m",
        *sorted(tmp_path.glob("[a-z]/step-*/m")),
    ]
    assert matching(tmp_path / "none", "*", "m") == []


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: tokenizer_provenance(folder / "data"),
        lambda folder: finished_counts(folder / "data"),
        lambda folder: read_score(folder / "data.json"),
    ],
    ids=["the record beside tokens", "a shard of an interrupted prepare", "a score"],
)
def test_work_whose_record_cannot_be_read_is_not_repeated(tmp_path, read):
    """A record without read permission was taken as missing or damaged, and work was done twice."""
    (tmp_path / "data.json").write_text(json.dumps({"tokenizer": {"fingerprint": "f", "vocab_size": 3}}))
    (tmp_path / "data.json").chmod(0)

    with modes_count(), pytest.raises(AccessError, match=r"data\.json: cannot be read: Permission denied"):
        read(tmp_path)


def test_a_shard_whose_tokens_cannot_be_read_is_not_prepared_again(tmp_path):
    """Its counts can be read, its .idx cannot."""
    counts = dict.fromkeys(("documents", "tokens", "held_out_documents", "held_out_tokens", "empty_documents"), 0)
    (tmp_path / "data.json").write_text(json.dumps({"counts": counts, "holdout": 0.0, "checksum": ""}))

    assert finished_counts(Path(tmp_path / "data")) is None  # no .idx
    (tmp_path / "data.idx").write_bytes(b"MMIDIDX\x00\x00")
    (tmp_path / "data.bin").write_bytes(b"")
    assert finished_counts(Path(tmp_path / "data")) is None  # damaged
    (tmp_path / "data.idx").chmod(0)
    with modes_count(), pytest.raises(DataError, match=r"data\.idx: cannot be read: Permission denied"):
        finished_counts(tmp_path / "data")
