"""The manifest makes a folder a checkpoint: what verification finds, and the order of writing and removing."""

import json
import os
import shutil
from pathlib import Path

import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from titan_cpt.checkpoint import manifest
from titan_cpt.cli import main
from titan_cpt.common.files import write_text_atomically
from titan_cpt.common.recipe import differences
from titan_cpt.errors import CheckpointError

RECORD = {
    "stage": "german",
    "stage_index": 1,
    "steps_done": 20,
    "run_step": 60,
    "kind": "interval",
    "recipe": {"training.seq_len": 128},
    "fingerprint": "0badcafe",
    "data": {"tokenizer": "bytes"},
}


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with two files, one of them in a subfolder, and its manifest."""
    folder = tmp_path / "german" / "step-00000020"
    (folder / "deep").mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(bytes(range(256)) * 40)
    (folder / "deep" / ".metadata").write_bytes(b"where the tensors lie")
    manifest.write(folder, RECORD)
    return folder


def edit(folder, **keys):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def verified(folder, *words):
    """The error message of `verify`, which must contain the words."""
    with pytest.raises(CheckpointError) as caught:
        manifest.verify(folder)
    message = str(caught.value)
    assert all(word in message for word in words), message
    return message


def status_of(*arguments):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    return left.value.code


def test_a_manifest_lists_every_file_with_its_size_and_checksum(checkpoint):
    """Checksums are xxhash's of whole files; hidden files and subfolders are included, the manifest is not."""
    record = json.loads((checkpoint / "manifest.json").read_text())
    files = record.pop("files")
    expected = xxhash.xxh3_128((checkpoint / "__0_0.distcp").read_bytes()).hexdigest()

    assert record == {"format": 2, **RECORD}
    assert {name: file["bytes"] for name, file in files.items()} == {"__0_0.distcp": 10240, "deep/.metadata": 21}
    assert files["__0_0.distcp"]["xxh3_128"] == expected
    assert manifest.verify(checkpoint) == {"format": 2, **RECORD, "files": files}
    assert not list(checkpoint.rglob("*.tmp"))


@pytest.mark.parametrize("place", [0, 5000, 10239])
def test_one_flipped_bit_is_found(checkpoint, place):
    """In the first, a middle and the last byte; the size is unchanged."""
    shard = checkpoint / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[place] ^= 1
    shard.write_bytes(content)

    verified(checkpoint, str(shard), "checksum")


@pytest.mark.parametrize("size", [0, 10239, 10241])
def test_another_size_is_reported(checkpoint, size):
    """A truncated file, and a longer one."""
    shard = checkpoint / "__0_0.distcp"
    shard.write_bytes((shard.read_bytes() + b"x")[:size])

    verified(checkpoint, str(shard), f"has {size} bytes", "10240")


def test_a_missing_file_is_reported(checkpoint):
    """The small one in a subfolder."""
    (checkpoint / "deep" / ".metadata").unlink()

    verified(checkpoint, str(checkpoint / "deep" / ".metadata"), "missing", "21 bytes")


def test_a_folder_with_the_name_of_a_file_is_a_missing_file(checkpoint):
    """verify does not read it."""
    (checkpoint / "__0_0.distcp").unlink()
    (checkpoint / "__0_0.distcp").mkdir()

    verified(checkpoint, "__0_0.distcp", "missing")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "deep/../../outside", "link/outside"])
def test_names_outside_the_folder_are_refused(checkpoint, name):
    """With dots, absolute, or through a link; the file exists and has the right size."""
    outside = checkpoint.parent / "outside"
    outside.write_bytes(b"12345")
    (checkpoint / "link").symlink_to(checkpoint.parent)
    edit(
        checkpoint,
        files={name: {"bytes": 5, "xxh3_128": xxhash.xxh3_128(b"12345").hexdigest()}},
    )

    verified(checkpoint, "manifest.json", "not a file of this folder")


def test_a_path_without_a_manifest_is_not_a_checkpoint(checkpoint):
    """The error says what it is: missing, a file, an interrupted save, a Hugging Face model, or a run."""
    stage = checkpoint.parent / "run" / "german"
    for step in range(5):
        shutil.copytree(checkpoint, stage / f"step-0000000{step}")
    (checkpoint / "manifest.json").unlink()
    interrupted = shutil.copytree(checkpoint, checkpoint.parent / "step-00000007")
    release = shutil.copytree(checkpoint, checkpoint.parent / "release")
    (release / "config.json").write_text("{}")
    (checkpoint / "file").write_text("")

    verified(checkpoint, str(checkpoint), "no manifest.json", "not a checkpoint")
    verified(checkpoint / "nowhere", "no such folder; a checkpoint is a folder with a manifest.json")
    verified(checkpoint / "file" / "below", "no such folder")
    verified(checkpoint / "file", "is a file, not a checkpoint")
    verified(interrupted, "not a checkpoint: its save was interrupted")
    verified(release, "not a checkpoint but a Hugging Face model: `titan-cpt import`")
    newest = ", ".join(f"{stage}/step-0000000{step}" for step in (2, 3, 4))
    verified(stage, f"is a stage of a run, not a checkpoint; its checkpoints are ..., {newest}")
    verified(stage.parent, f"is a run, not a checkpoint; its checkpoints are ..., {newest}")


def test_a_manifest_of_another_format_is_refused(checkpoint):
    """One of a later version."""
    edit(checkpoint, format=3)

    verified(checkpoint, "format 3", "reads format 2")


@pytest.mark.parametrize("key", [*RECORD, "files", "format"])
@pytest.mark.parametrize("fault", ["missing", "of the wrong type"])
def test_every_required_key_is_checked(checkpoint, key, fault):
    """Each one missing, or of the wrong type: a list of one null."""
    path = checkpoint / "manifest.json"
    content = json.loads(path.read_text())
    content.pop(key)
    path.write_text(json.dumps(content if fault == "missing" else {**content, key: [None]}))

    verified(checkpoint, "manifest.json", "format" if (key, fault) == ("format", "of the wrong type") else key)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
WHOLE = {"format": 2, **RECORD, "files": {}}


def refused_or_whole(folder):
    try:
        found = manifest.verify(folder)
    except CheckpointError:
        return

    assert all(isinstance(found[key], type(value)) for key, value in WHOLE.items())


@settings(max_examples=150, deadline=None)
@given(content=JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=200))
@example(content=b"")
@example(content=b"[" * 100_000)
@example(content=b'{"format": ' + b"9" * 5000 + b"}")
@example(content=b"\xff\xfe\x00")
def test_any_content_of_a_manifest_is_read_or_raises_our_error(tmp_path_factory, content):
    """Arbitrary JSON and arbitrary bytes."""
    folder = tmp_path_factory.mktemp("any")
    (folder / "manifest.json").write_bytes(content)
    refused_or_whole(folder)
    shutil.rmtree(folder)


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from(sorted(WHOLE)), value=JSON)
@example(key="files", value={"\0": {"bytes": 1}})
@example(key="files", value={"\ud800": {"bytes": 1}})
@example(key="files", value={"x" * 300: {"bytes": 1}})
@example(key="files", value={"": {"bytes": 1}})
@example(key="stage_index", value="one")
def test_a_valid_manifest_with_any_value_for_one_key_is_read_or_raises_our_error(tmp_path_factory, key, value):
    """Also if the wrong entry is a file name that is impossible on every file system."""
    folder = tmp_path_factory.mktemp("nearly")
    (folder / "manifest.json").write_text(json.dumps({**WHOLE, key: value}))
    refused_or_whole(folder)
    shutil.rmtree(folder)


def test_removing_starts_with_the_manifest(checkpoint, monkeypatch):
    """An interrupted removal leaves a folder without a manifest, never a manifest without its files."""
    monkeypatch.setattr(shutil, "rmtree", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        manifest.remove(checkpoint)

    assert not (checkpoint / "manifest.json").exists()
    assert (checkpoint / "__0_0.distcp").exists()


def test_removing_deletes_the_folder_and_can_be_repeated(checkpoint):
    """Removing a missing checkpoint is not an error."""
    manifest.remove(checkpoint)
    manifest.remove(checkpoint)

    assert not checkpoint.exists()


def test_removing_keeps_files_that_do_not_belong_to_the_checkpoint(checkpoint):
    """An export, notes and links in its folder are kept when it is pruned or saved again."""
    (checkpoint / "hf").mkdir()
    for name in ("hf/model.safetensors", "notes.txt", "rank-0.safetensors"):
        (checkpoint / name).write_text("mine")
    (checkpoint / "link").symlink_to("/nowhere")
    for name in ("rank-00000-0.safetensors", ".manifest.json.7-0.tmp", "index.json"):
        (checkpoint / name).write_text("left by a save that was killed")
    with pytest.raises(FileExistsError, match=r"to a checkpoint \(hf/model\.safetensors, link, notes\.txt, rank-0"):
        manifest.make_room(checkpoint)

    left = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if not path.is_dir()}
    assert left == {"hf/model.safetensors", "notes.txt", "rank-0.safetensors", "link"}


def test_all_files_are_fsynced_before_the_manifest_is_renamed(tmp_path, monkeypatch):
    """The order of fsync and rename: files, the manifest's text, its name, the folder."""
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    (folder / "shard").write_bytes(b"weights")
    happened = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor):
        happened.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_replace(self, target):
        happened.append(f"{self.name} -> {Path(target).name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    manifest.write(folder, RECORD)

    temporary = f".manifest.json.{os.getpid()}-0.tmp"
    assert happened[:4] == ["shard", temporary, f"{temporary} -> manifest.json", "step-00000001"]


def test_text_is_replaced_atomically(tmp_path, monkeypatch):
    """A failure before the rename leaves the old text."""
    path = tmp_path / "summary.json"
    write_text_atomically(path, "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        write_text_atomically(path, "new")

    assert path.read_text() == "old"


def test_differences_name_the_key_the_old_and_the_new_value():
    """Changed, new and gone keys, sorted; 1 and 1.0 differ, tuples and lists do not."""
    old = {"a": 1, "b": "x", "gone": 0.5, "list": [1, 2], "same": {"p": 1, "q": 2}}
    new = {"a": 1.0, "b": "y", "new": [1], "list": (1, 2), "same": {"q": 2, "p": 1}}

    assert differences(old, new) == [
        "a: 1 -> 1.0",
        "b: x -> y",
        "gone: 0.5 -> not set",
        "new: not set -> [1]",
    ]


def test_titan_cpt_verify_exits_with_0_or_2(checkpoint, capsys):
    """A valid checkpoint, a damaged one, no checkpoint; the fault is printed to stderr without a traceback."""
    good = status_of("verify", str(checkpoint))
    told = capsys.readouterr()
    (checkpoint / "__0_0.distcp").write_bytes(b"")
    damaged = status_of("verify", str(checkpoint))
    complaint = capsys.readouterr()
    nothing = status_of("verify", str(checkpoint.parent))

    assert (good, damaged, nothing) == (0, 2, 2)
    assert "good, 2 files, 10,261 bytes, plan 0badcafe" in told.out
    assert complaint.err.startswith("CheckpointError: ")
    assert "Traceback" not in complaint.err + capsys.readouterr().err
