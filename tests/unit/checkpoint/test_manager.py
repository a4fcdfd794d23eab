"""Saving while training continues, loading bit for bit, pruning, and finding the newest valid checkpoint."""

import json
import os

import pytest
import torch
import training
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager

from titan_cpt.checkpoint import manager, manifest
from titan_cpt.checkpoint.manager import CheckpointManager
from titan_cpt.checkpoint.state_dict import load_state
from titan_cpt.common.run_folder import INTERVAL, PRE_ANNEAL, STAGE_END, checkpoint_folder
from titan_cpt.errors import CheckpointError
from titan_cpt.training.optimization.adamw import build_adamw

pytestmark = training.THEIR_WARNINGS_IGNORED

NUMBERS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class Small(nn.Module):
    """A model with a matrix and a vector."""

    def __init__(self, width=4):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(3, width, generator=generator))
        self.bias = nn.Parameter(torch.randn(3, generator=generator))


def trained(steps):
    """A model and its optimizer after `steps` steps."""
    model = Small()
    optimizer = build_adamw(model, **NUMBERS)
    for step in range(steps):
        take_step(model, optimizer, step)
    return model, optimizer


def take_step(model, optimizer, step):
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def everything(model, optimizer):
    """Weights, moments and step counts, copied."""
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        found |= {f"{name}.{key}": value.clone() for key, value in optimizer.state[parameter].items()}
    return found


def record_of(stage_index=0, kind=INTERVAL):
    recipe = {"training.seq_len": 8}
    return {"stage_index": stage_index, "kind": kind, "run_step": 0, "recipe": recipe, "fingerprint": "00", "data": {}}


def checkpoints_in(run, *, keep=2, async_save=True, on_saved=lambda folder: None):
    return CheckpointManager(run, keep_latest=keep, async_save=async_save, on_saved=on_saved)


def save_all(checkpoints, *moments):
    """Each moment is (stage, stage_index, steps_done, kind)."""
    model, optimizer = trained(1)
    for stage, index, done, kind in moments:
        checkpoints.save(model, optimizer, stage=stage, steps_done=done, record=record_of(index, kind))
    checkpoints.wait()


def damage(folder):
    shard = next(folder.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize("async_save", [True, False])
def test_a_loaded_state_equals_the_saved_one_bit_for_bit(tmp_path, async_save):
    """Weights, both moments and step counts, loaded into another model and optimizer."""
    checkpoints = checkpoints_in(tmp_path, async_save=async_save)
    model, optimizer = trained(3)
    saved = everything(model, optimizer)
    checkpoints.save(model, optimizer, stage="a", steps_done=3, record=record_of())
    checkpoints.wait()
    other_model, other_optimizer = trained(7)
    load_state(tmp_path / "a" / "step-00000003", other_model, other_optimizer)
    loaded = everything(other_model, other_optimizer)

    assert training.same_bits(saved, loaded)
    assert loaded["weight.step"].item() == 3


def test_a_save_holds_the_state_at_the_call_although_training_continues(tmp_path, monkeypatch):
    """Two more steps are taken before anything is written; the earlier state is written."""
    model, optimizer = trained(3)
    saved = everything(model, optimizer)
    checkpoints = checkpoints_in(tmp_path)
    checkpoints.save(model, optimizer, stage="a", steps_done=3, record=record_of())
    for step in (3, 4):
        take_step(model, optimizer, step)
    went_on = everything(model, optimizer)
    checkpoints.wait()
    load_state(tmp_path / "a" / "step-00000003", model, optimizer)

    assert training.same_bits(saved, everything(model, optimizer))
    assert not training.same_bits(saved, went_on)


def test_a_second_save_needs_no_stager_that_can_be_used_twice(tmp_path, monkeypatch):
    """As before torch 2.13, where a stager closes itself after its first use."""

    class UsedOnce(DefaultStager):
        def stage(self, state_dict, **kwargs):
            staged = super().stage(state_dict, **kwargs)
            self.close()
            return staged

    monkeypatch.setattr(manager, "DefaultStager", UsedOnce)
    monkeypatch.setattr(manager, "STAGER_CAN_BE_REUSED", False)
    save_all(checkpoints_in(tmp_path), ("a", 0, 1, INTERVAL), ("a", 0, 2, INTERVAL))

    assert [found.folder.name for found in checkpoints_in(tmp_path).listed()] == ["step-00000002", "step-00000001"]


def test_a_save_changes_neither_weights_nor_optimizer_state(tmp_path):
    """Two saves change nothing in memory."""
    model, optimizer = trained(3)
    before = everything(model, optimizer)
    checkpoints = checkpoints_in(tmp_path)
    for done in (3, 4):
        checkpoints.save(model, optimizer, stage="a", steps_done=done, record=record_of())
    checkpoints.wait()

    assert training.same_bits(before, everything(model, optimizer))


def test_without_an_optimizer_only_weights_are_loaded(tmp_path):
    """A stage that resets its optimizer does not need the old moments; those in memory are kept."""
    checkpoints = checkpoints_in(tmp_path)
    model, optimizer = trained(3)
    saved = everything(model, optimizer)
    checkpoints.save(model, optimizer, stage="a", steps_done=3, record=record_of())
    checkpoints.wait()
    other_model, other_optimizer = trained(7)
    before = everything(other_model, other_optimizer)
    load_state(tmp_path / "a" / "step-00000003", other_model, None)
    after = everything(other_model, other_optimizer)

    assert {name for name in saved if torch.equal(after[name], saved[name])} == {"weight", "bias"}
    assert all(torch.equal(after[name], before[name]) for name in before if "." in name)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    """A matrix of another width, and a missing tensor."""
    checkpoints = checkpoints_in(tmp_path)
    model, optimizer = trained(1)
    checkpoints.save(model, optimizer, stage="a", steps_done=1, record=record_of())
    checkpoints.wait()
    more = nn.Sequential(Small())

    with pytest.raises(CheckpointError, match="step-00000001: cannot be loaded"):
        load_state(tmp_path / "a" / "step-00000001", Small(width=5), None)
    with pytest.raises(CheckpointError, match="step-00000001: cannot be loaded"):
        load_state(tmp_path / "a" / "step-00000001", more, None)


def test_on_saved_is_called_after_the_manifest_is_written(tmp_path):
    """The manifest holds the record, and the folder verifies."""
    messages = []
    checkpoints = checkpoints_in(tmp_path, on_saved=lambda folder: messages.append((folder, manifest.verify(folder))))
    save_all(checkpoints, ("a", 4, 12, STAGE_END))
    folder, found = messages[0]

    assert len(messages) == 1
    assert folder == tmp_path / "a" / "step-00000012" == checkpoint_folder(tmp_path, "a", 12)
    assert (found["stage"], found["stage_index"], found["steps_done"], found["kind"]) == ("a", 4, 12, "stage_end")
    assert found["torch"] == torch.__version__


def test_only_interval_checkpoints_are_pruned(tmp_path):
    """The newest two intervals over both stages are kept, and every stage end and pre-anneal checkpoint."""
    moments = [("a", 0, 0, PRE_ANNEAL), *(("a", 0, n, INTERVAL) for n in (10, 20, 30))]
    moments += [("a", 0, 35, PRE_ANNEAL), ("a", 0, 40, STAGE_END), ("b", 1, 10, INTERVAL)]
    save_all(checkpoints_in(tmp_path, keep=2), *moments)
    left = training.checkpoints_of(tmp_path)
    folders = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/step-*"))

    assert left == ["a/step-00000000", "a/step-00000030", "a/step-00000035", "a/step-00000040", "b/step-00000010"]
    assert folders == left


@pytest.mark.parametrize("keep", [1, 3])
def test_keep_latest_interval_checkpoints_are_kept(tmp_path, keep):
    """Of five."""
    save_all(checkpoints_in(tmp_path, keep=keep), *(("a", 0, n, INTERVAL) for n in (1, 2, 3, 4, 5)))

    assert training.checkpoints_of(tmp_path) == [f"a/step-{n:08d}" for n in (1, 2, 3, 4, 5)][-keep:]


def test_the_checkpoint_just_written_is_kept_beside_a_damaged_one_of_a_later_step(tmp_path):
    """A run rolled back behind a damaged checkpoint, with keep_latest 1."""
    save_all(checkpoints_in(tmp_path, keep=1), ("a", 0, 30, INTERVAL))
    damage(tmp_path / "a" / "step-00000030")
    checkpoints = checkpoints_in(tmp_path, keep=1)
    save_all(checkpoints, ("a", 0, 25, INTERVAL))
    found = checkpoints.newest_valid(lambda message: None)

    assert found is not None
    assert found.folder == tmp_path / "a" / "step-00000025"


def test_listed_is_newest_first_over_stages(tmp_path):
    """Sorted by stage index and steps done, not by name."""
    save_all(
        checkpoints_in(tmp_path),
        ("zebra", 0, 9, STAGE_END),
        ("zebra", 0, 5, PRE_ANNEAL),
        ("ape", 1, 2, STAGE_END),
    )
    listed = [(f.manifest["stage"], f.manifest["steps_done"]) for f in checkpoints_in(tmp_path).listed()]

    assert listed == [("ape", 2), ("zebra", 9), ("zebra", 5)]


def test_a_save_does_not_overwrite_a_checkpoint_of_another_stage(tmp_path):
    """Someone renamed a stage's folder: the checkpoint in it is kept, and the error names it."""
    failures = []
    checkpoints = CheckpointManager(
        tmp_path, keep_latest=2, async_save=False, on_saved=lambda path: None, on_failed=failures.append
    )
    checkpoints.save(*trained(1), stage="old", steps_done=1, record=record_of())
    (tmp_path / "old").rename(tmp_path / "new")
    before = training.files_of(tmp_path / "new")
    checkpoints.save(*trained(1), stage="new", steps_done=1, record=record_of())

    assert "holds the checkpoint of 'old' after 1 steps; move it to another folder" in str(failures[0])
    assert training.files_of(tmp_path / "new") == before


def test_damaged_checkpoints_are_skipped_and_reported(tmp_path):
    """A flipped bit in one, a manifest that is not JSON in another. A folder without a manifest is ignored silently."""
    checkpoints = checkpoints_in(tmp_path)
    save_all(checkpoints, *(("a", 0, n, STAGE_END) for n in (1, 2, 3, 4)))
    damage(tmp_path / "a" / "step-00000003")
    (tmp_path / "a" / "step-00000002" / "manifest.json").write_text("{")
    (tmp_path / "a" / "step-00000004" / "manifest.json").unlink()
    messages = []
    found = checkpoints.newest_valid(messages.append)

    assert found is not None
    assert found.folder.name == "step-00000001"
    assert [message.split(": ")[0].split("/")[-2] for message in messages] == ["step-00000002", "step-00000003"]
    assert "manifest.json" in messages[0]
    assert "checksum" in messages[1]


def test_newest_valid_is_none_without_a_valid_checkpoint(tmp_path):
    """In an empty folder, and with only a damaged checkpoint."""
    checkpoints = checkpoints_in(tmp_path)
    empty = checkpoints.newest_valid(lambda message: None)
    save_all(checkpoints, ("a", 0, 1, INTERVAL))
    damage(tmp_path / "a" / "step-00000001")

    assert empty is None
    assert checkpoints.newest_valid(lambda message: None) is None


def test_a_save_removes_the_files_of_an_interrupted_one(tmp_path):
    """Old shards, perhaps of other parallelism degrees, do not mix with the new ones."""
    folder = tmp_path / "a" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / "rank-00007-0.safetensors").write_bytes(b"half a shard")
    save_all(checkpoints_in(tmp_path), ("a", 0, 1, INTERVAL))

    assert not (folder / "rank-00007-0.safetensors").exists()
    assert "rank-00007-0.safetensors" not in manifest.verify(folder)["files"]


@pytest.mark.parametrize("async_save", [True, False])
def test_a_failed_save_names_the_newest_complete_checkpoint(tmp_path, async_save):
    """A file has the name of the second stage's folder; the earlier checkpoint still verifies."""
    checkpoints = checkpoints_in(tmp_path, async_save=async_save)
    save_all(checkpoints, ("a", 0, 4, STAGE_END))
    (tmp_path / "b").write_text("in the way")

    with pytest.raises(CheckpointError, match=r"b/step-00000002: cannot be written: .*step-00000004 is the newest"):
        save_all(checkpoints, ("b", 1, 2, INTERVAL))
    assert manifest.verify(tmp_path / "a" / "step-00000004")["steps_done"] == 4


@pytest.mark.parametrize("async_save", [True, False])
def test_a_full_disk_leaves_no_manifest(tmp_path, monkeypatch, async_save):
    """The error of the writing thread is raised by `wait`; the next save works."""
    fsync, full = os.fsync, [True]

    def no_room(descriptor):
        if full[0]:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    checkpoints = checkpoints_in(tmp_path, async_save=async_save)
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(CheckpointError, match=r"No space left on device.*there is no earlier checkpoint"):
        save_all(checkpoints, ("a", 0, 1, INTERVAL))
    left = training.checkpoints_of(tmp_path)
    full[0] = False
    save_all(checkpoints, ("a", 0, 1, INTERVAL))

    assert left == []
    assert training.checkpoints_of(tmp_path) == ["a/step-00000001"]


def test_poll_reports_a_finished_save_and_does_not_wait(tmp_path):
    """`on_saved` is not called while the checkpoint is being written."""
    messages = []
    checkpoints = checkpoints_in(tmp_path, on_saved=messages.append)
    checkpoints.poll()
    model, optimizer = trained(1)
    checkpoints.save(model, optimizer, stage="a", steps_done=1, record=record_of())
    before = list(messages)
    checkpoints.wait()
    checkpoints.poll()

    assert before == []
    assert messages == [tmp_path / "a" / "step-00000001"]


def test_the_manifest_is_json_with_the_recipe(tmp_path):
    """find_checkpoint compares it on resume."""
    save_all(checkpoints_in(tmp_path), ("a", 0, 1, INTERVAL))
    found = json.loads((tmp_path / "a" / "step-00000001" / "manifest.json").read_text())

    assert found["recipe"] == {"training.seq_len": 8}
    assert set(found["files"]) >= {"index.json"}
