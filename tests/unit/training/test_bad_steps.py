"""Losses that are not finite: the run stops with the state of the step before, and resumes from it."""

import gc
import math

import pytest
import torch
import training

import titan_cpt.training.forward_backward
from titan_cpt.checkpoint import manifest
from titan_cpt.cli import main
from titan_cpt.models.gpt_neox.model import GPTNeoX
from titan_cpt.train import run

pytestmark = training.THEIR_WARNINGS_IGNORED


@pytest.fixture
def raw(tmp_path):
    """Two small stages."""
    return training.two_stages(training.write_languages(tmp_path), tmp_path)


@pytest.fixture(autouse=True)
def garbage_is_collected_again():
    """A run turns Python's collector off and ends with its process; this one continues."""
    yield
    gc.enable()


def command(raw):
    """The exit status of `titan-cpt train` in this process."""
    out = raw["job"]["output_dir"]
    path = training.write_config(raw, training.Path(out) / f"{raw['job']['name']}.toml")
    with pytest.raises(SystemExit) as left:
        main(["train", "--config", str(path)])
    return left.value.code


def poison(monkeypatch, call, value=math.nan):
    """The `call`-th loss that is worked out for training is replaced by another number, and so is its gradient."""
    calls, sound = [0], titan_cpt.training.forward_backward.fused_linear_cross_entropy

    def poisoned(*tensors, **numbers):
        calls[0] += 1
        return sound(*tensors, **numbers) * (value if calls[0] == call else 1.0)

    monkeypatch.setattr(titan_cpt.training.forward_backward, "fused_linear_cross_entropy", poisoned)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_with_the_weights_of_the_step_before(raw, monkeypatch, capsys, value):
    """The seventh step's second micro-batch, noticed after the eighth step: 1, and a checkpoint of six steps."""
    whole = training.changed(raw, job={"name": "whole"}, checkpoint={"interval": 6}, metrics={"log_freq": 100})
    run(training.config_of(training.changed(whole, stages=raw["stages"][:1])))
    poison(monkeypatch, 14, value)
    status = command(training.changed(raw, metrics={"log_freq": 100}))
    complaint = capsys.readouterr().err
    out = training.Path(raw["job"]["output_dir"])
    good, saved = out / "whole" / "english" / "step-00000006", out / "run" / "english" / "step-00000006"

    assert status == 1
    assert complaint.startswith("NumericsError: stage english, step 6 ")
    assert str(saved) in complaint
    assert "Traceback" not in complaint
    assert training.checkpoints_of(out / "run") == ["english/step-00000004", "english/step-00000006"]
    assert manifest.verify(saved)["steps_done"] == 6
    for part in ("model", "optimizer"):
        assert training.same_bits(training.tensors_of(saved, part), training.tensors_of(good, part))
    assert all(torch.isfinite(tensor).all() for tensor in training.tensors_of(saved).values())


def test_after_a_bad_step_the_same_command_resumes_from_the_step_before(raw, monkeypatch):
    """Without the cause (a cosmic ray, say), the run ends with the numbers of an unbroken one."""
    config = training.config_of(training.changed(raw, job={"name": "whole"}))
    run(config)
    with monkeypatch.context() as patch:
        poison(patch, 14)
        stopped = command(raw)
    status = command(raw)
    out = training.Path(raw["job"]["output_dir"])

    assert (stopped, status) == (1, 0)
    assert training.numbers_of(out / "run") == training.numbers_of(out / "whole")


def test_a_poisoned_weight_stops_the_run_at_its_first_step(raw, capsys, monkeypatch):
    """A NaN in every embedding: no checkpoint is made of it, and the message says that there is none."""
    sound = GPTNeoX.init_weights

    def broken(self, seed):
        sound(self, seed)
        with torch.no_grad():
            self.embedding.weight[:, 3] = math.nan

    monkeypatch.setattr(GPTNeoX, "init_weights", broken)
    status = command(raw)
    complaint = capsys.readouterr().err

    assert status == 1
    assert "stage english, step 0 " in complaint
    assert "newest checkpoint: none" in complaint
    assert training.checkpoints_of(training.Path(raw["job"]["output_dir"]) / "run") == []


def test_a_bad_step_right_after_the_pre_anneal_checkpoint_leaves_it_unchanged(raw, monkeypatch):
    """The tenth step: the state before it is already saved, not as an interval checkpoint, which is pruned."""
    poison(monkeypatch, 19)
    status = command(raw)
    folder = training.Path(raw["job"]["output_dir"]) / "run"

    assert status == 1
    assert manifest.verify(folder / "english" / "step-00000009")["kind"] == "pre_anneal"


def test_a_bad_step_is_not_reported_before_the_metrics_are_flushed(raw, monkeypatch):
    """Logging interval 100, no checkpoint due: the stage's end detects it and saves only the step before."""
    poison(monkeypatch, 5)
    quiet = {"metrics": {"log_freq": 100}, "checkpoint": {"interval": 100}, "validation": {"interval": 100}}
    raw["stages"][0] |= {"lr": {"schedule": "cosine", "max": 3e-3}}
    status = command(training.changed(raw, **quiet))
    folder = training.Path(raw["job"]["output_dir"]) / "run"

    assert status == 1
    assert training.checkpoints_of(folder) == ["english/step-00000002"]
