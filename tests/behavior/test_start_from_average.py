"""A stage that starts from an average trains, bit for bit, as one that starts from a checkpoint of these weights.

The averages are written into the checkpoints by hand, and so are the weights that they are compared with.
"""

import shutil
from pathlib import Path

import averaged
import pytest
import training
from training import Fault, built_trainer, config_of, train

from titan_cpt.errors import CheckpointError
from titan_cpt.training.stage_start import begin_stage

pytestmark = training.THEIR_WARNINGS_IGNORED


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of English, whose end holds an average, and beside it a copy that has the average as its weights."""
    folder = tmp_path_factory.mktemp("base")
    raw = training.two_stages(training.write_languages(folder), folder)
    raw = training.changed(raw, stages=raw["stages"][:1])
    outcome = train(training.write_config(raw, folder / "run.toml"))

    assert outcome.status == 0, outcome.output
    end = folder / "run" / "english" / "step-00000012"
    average = averaged.distort(training.tensors_of(end))
    averaged.replace_weights(shutil.copytree(end, folder / "replaced"), average)
    averaged.add_average(end, average)
    return folder


def german(base, out, name, init, **more):
    """The config of a run of German from these weights."""
    raw = training.two_stages(base, out)
    stage = {**raw["stages"][1], "optimizer_state": "reset", "replay": {"fraction": 0.0}, "init": init, **more}
    return training.changed(raw, job={"name": name}, stages=[stage])


def trained(raw, **fault):
    """`titan-cpt train` of this config, to its end."""
    folder = Path(raw["job"]["output_dir"])
    return train(training.write_config(raw, folder / f"{raw['job']['name']}.toml"), **fault)


@pytest.fixture(scope="module")
def by_hand(base):
    """German, from the checkpoint with the average as its weights."""
    outcome = trained(german(base, base, "by-hand", f"checkpoint:{base}/replaced"))

    assert outcome.status == 0, outcome.output
    return base / "by-hand"


def assert_equal_runs(run, expected):
    """Every number that was measured, and the weights and moments at the end."""
    end = "german/step-00000010"

    assert training.numbers_of(run) == training.numbers_of(expected)
    for part in ("model", "optimizer"):
        assert training.same_bits(training.tensors_of(run / end, part), training.tensors_of(expected / end, part))


def test_a_stage_from_an_average_equals_one_from_a_checkpoint_with_these_weights(base, by_hand, tmp_path):
    """Killed in its middle and resumed, too: the average is loaded once, when the stage begins."""
    init = f"checkpoint:{base}/run/english/step-00000012@average"
    raw = german(base, tmp_path, "run", init)
    killed = trained(raw, fault=Fault("titan_cpt.train:Trainer.train_step", 7, tmp_path / "run/german/step-00000004"))
    resumed = trained(raw)

    assert (killed.status, resumed.status) == (-9, 0), resumed.output
    assert "resumes after step 4" in resumed.output
    assert_equal_runs(tmp_path / "run", by_hand)
    assert training.events_of(tmp_path / "run", "transition")[0]["weights"].startswith(f"from {init[11:]}")


def test_the_average_of_an_uploaded_checkpoint_is_downloaded(base, by_hand, tmp_path):
    """A URL with the suffix; without it the same download has the weights."""
    expected = training.tensors_of(base / "replaced")
    where = f"checkpoint:file://{base}/run/english/step-00000012"
    for name, init, average in (("average", f"{where}@average", True), ("raw", where, False)):
        with built_trainer(config_of(german(base, tmp_path, name, init))) as trainer:
            begin_stage(trainer, trainer.plan.stages[0])

            assert training.same_bits(dict(trainer.model.state_dict()), expected) == average


def test_a_stage_from_a_checkpoint_without_an_average_is_refused_before_the_first_step(base, by_hand, tmp_path):
    """And by `plan`, which reads the manifest. The message names the checkpoint's run and what it has."""
    init = f"checkpoint:{by_hand}/german/step-00000010@average"
    outcome = trained(german(base, tmp_path, "run", init))

    assert outcome.status == 2
    assert f"{by_hand}/german/step-00000010: holds no average of its weights" in " ".join(outcome.output.split())
    with (
        pytest.raises(CheckpointError, match="holds no average"),
        built_trainer(config_of(german(base, tmp_path, "other", init))),
    ):
        pass


def test_moments_of_the_weights_are_not_kept_for_their_average(base, tmp_path):
    """The config is refused, with what to do."""
    raw = german(base, tmp_path, "run", f"checkpoint:{base}/run/english/step-00000012@average", optimizer_state="keep")
    outcome = trained(raw)

    assert outcome.status == 2
    assert "stages.german.optimizer_state: the moments in the checkpoint belong to the weights" in outcome.output
