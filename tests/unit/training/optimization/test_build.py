"""Which optimizer a run has, and what its stages do with it."""

import shutil

import pytest
import training
from torch.optim import AdamW

from titan_cpt.config.schema import Config
from titan_cpt.train import run
from titan_cpt.training.optimization.muon import Muon

pytestmark = training.THEIR_WARNINGS_IGNORED


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """AdamW, then Muon with other numbers, then AdamW again; each stage begins with the end of the one before."""
    folder = tmp_path_factory.mktemp("muon")
    raw = training.two_stages(training.write_languages(folder), folder)
    raw["stages"].append({**training.third_stage(), "steps": 3})
    english, german, _ = raw["stages"]
    english |= {"steps": 3, "lr": {"schedule": "constant", "max": 2e-3}}
    german |= {"steps": 6, "optimizer_state": "reset", "optimizer": {"name": "Muon", "ns_steps": 4}}
    return training.changed(raw, checkpoint={"interval": 2, "keep_latest_k": 9}, validation={"interval": 50})


def config_of(raw, **tables) -> Config:
    return training.config_of(training.changed(raw, **tables))


def test_a_run_without_muon_has_the_plain_adamw(raw):
    """Also with Muon's name in no stage; one stage with Muon is enough for the other."""
    stages = [{**stage, "optimizer": {}} for stage in raw["stages"]]
    with training.built_trainer(config_of(raw, job={"name": "plain"}, stages=stages)) as trainer:
        assert type(trainer.optimizer) is AdamW
    with training.built_trainer(config_of(raw, job={"name": "with-muon"})) as trainer:
        assert type(trainer.optimizer) is Muon


def test_stages_change_the_optimizer_and_a_resume_within_muons_stage_has_the_same_bits(raw):
    """Checkpoints hold momentum where Muon trained and moments where AdamW did; training after a resume is the same."""
    config = config_of(raw)
    folder = training.Path(config.job.output_dir) / "run"
    assert run(config) == 0
    ends = [
        folder / "english" / "step-00000003",
        folder / "german" / "step-00000006",
        folder / "again" / "step-00000003",
    ]
    whole = [training.tensors_of(end, part) for end in ends for part in ("model", "optimizer")]
    numbers = training.numbers_of(folder)
    shutil.rmtree(folder / "again")
    shutil.rmtree(folder / "german" / "step-00000006")
    assert run(config) == 0

    kinds = [{name.rsplit(".", 1)[1] for name in each if "mlp.up.weight" in name} for each in whole[1::2]]
    assert kinds == [{"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}, {"step", "exp_avg", "exp_avg_sq"}]
    assert {event["step"] for event in training.events_of(folder, "resume")} == {4}
    again = [training.tensors_of(end, part) for end in ends for part in ("model", "optimizer")]
    assert all(training.same_bits(before, after) for before, after in zip(whole, again, strict=True))
    assert training.numbers_of(folder) == numbers
