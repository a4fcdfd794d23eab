"""A stage that starts from an average trains, bit for bit, as one that starts from a checkpoint of these weights.

The weights that it is compared with are written into checkpoints by hand, and so are the averages of the first tests;
those of the later tests are written by training.
"""

import shutil
from pathlib import Path

import averaged
import pytest
import training
from safetensors.torch import load_file
from training import Fault, built_trainer, config_of, train

from titan_cpt.api import export
from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.checkpoint_spec import spec_of_checkpoint
from titan_cpt.errors import CheckpointError
from titan_cpt.models.huggingface_weights import hub_names
from titan_cpt.training.stage_start import begin_stage

pytestmark = training.THEIR_WARNINGS_IGNORED
FEWER = ("--validation.sequences", "3")


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


AVERAGING = {"kind": "mean", "last": 4, "every": 2}  # of steps 7 and 9 at the pre-anneal point, which is step 9


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    """A run of English that averages its weights and keeps every checkpoint; German can be appended to its config."""
    folder = tmp_path_factory.mktemp("english")
    raw = with_german(folder, folder)
    outcome = trained(training.changed(raw, stages=raw["stages"][:1]))

    assert outcome.status == 0, outcome.output
    return folder


def with_german(data, out, init="stage:english@pre_anneal@average", averaging=AVERAGING, **german):
    """The config of English with an average, and German from it."""
    if not (data / "en.bin").exists():
        training.write_languages(data)
    raw = training.two_stages(data, out)
    english, second = raw["stages"]
    stages = [
        {**english, "averaging": averaging},
        {**second, "optimizer_state": "reset", "init": init, "averaging": "off", **german},
    ]
    return training.changed(raw, stages=stages, checkpoint={"interval": 1, "keep_latest_k": 20})


def mean_of_two(run):
    """The mean of the weights after steps 7 and 9, in float64, rounded once."""
    return averaged.mean_of([training.tensors_of(run / "english" / f"step-0000000{step}") for step in (7, 9)])


def copied(english, out):
    """The run of English under another folder."""
    shutil.copytree(english / "run", out / "run")
    return out / "run"


def test_the_average_of_a_stage_is_exported_as_the_mean_computed_by_hand(english, tmp_path):
    """In float32, from the checkpoint at the pre-anneal point, which training wrote."""
    checkpoint = english / "run" / "english" / "step-00000009"
    export(f"{checkpoint}@average", tmp_path / "out", dtype="float32")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    names = hub_names(spec_of_checkpoint(manifest.read(checkpoint), checkpoint))

    assert training.same_bits(exported, {names[key]: weight for key, weight in mean_of_two(english / "run").items()})


@pytest.fixture(scope="module")
def german_by_hand(english, tmp_path_factory):
    """German, from the pre-anneal point of a run in which the mean is written into the place of the weights."""
    out = tmp_path_factory.mktemp("by-hand")
    run = copied(english, out)
    averaged.replace_weights(run / "english" / "step-00000009", mean_of_two(run))
    outcome = trained(with_german(english, out, init="stage:english@pre_anneal"))

    assert outcome.status == 0, outcome.output
    return run


def test_a_stage_from_the_average_of_the_stage_before_equals_one_from_these_weights(english, german_by_hand, tmp_path):
    """German after English in one run, killed and resumed, with replay of what the averaged weights have seen."""
    run = copied(english, tmp_path)
    raw = with_german(english, tmp_path)
    killed = trained(raw, fault=Fault("titan_cpt.train:Trainer.train_step", 6, run / "german/step-00000004"))
    resumed = trained(raw)

    assert (killed.status, resumed.status) == (-9, 0), resumed.output
    assert_equal_runs(run, german_by_hand)
    recipe = manifest.read(run / "german" / "step-00000010")["recipe"]
    assert recipe["stages.german.init"] == "english@9@average"
    assert recipe["stages.german.init.averaging.kind"] == "mean"


def test_a_baseline_that_is_measured_again_is_measured_on_the_average(english, tmp_path):
    """Validation windows change within German: its losses before the first step are those of the average again."""
    runs = {}
    for name, first in (("always", FEWER), ("later", ())):
        run = copied(english, tmp_path / name)
        raw = with_german(english, tmp_path / name)
        fault = Fault("titan_cpt.train:Trainer.train_step", 6, run / "german/step-00000004")
        stopped = train(training.write_config(raw, tmp_path / name / "run.toml"), *first, fault=fault)
        outcome = train(tmp_path / name / "run.toml", *FEWER)
        assert (stopped.status, outcome.status) == (-9, 0), outcome.output
        runs[name] = run
    lines = {name: training.lines_of(run, "validation") for name, run in runs.items()}
    again = {line["dataset"]: line["loss_nats_per_token"] for line in lines["later"] if line.get("measured_again")}
    began = {
        line["dataset"]: line["loss_nats_per_token"]
        for line in lines["always"]
        if (line["stage"], line["step"]) == ("german", 0)
    }

    assert again
    assert again == {dataset: began[dataset] for dataset in again}


def test_an_average_of_other_settings_than_the_config_has_is_refused(english, tmp_path):
    """Settings that changed after English: before German begins, and when it has begun, with what differs."""
    run = copied(english, tmp_path)
    other = with_german(english, tmp_path, averaging={**AVERAGING, "kind": "ema"})
    refused = trained(other)
    started = trained(with_german(english, tmp_path))
    later = trained(other)

    assert (refused.status, started.status, later.status) == (2, 0, 2), started.output
    text = " ".join(refused.output.split())
    assert f"{run}/english/step-00000009: its average was made with other settings" in text
    assert "kind: mean -> ema" in text
    assert "stages.german.init.averaging.kind: mean -> ema" in later.output


def test_an_average_that_no_checkpoint_holds_is_refused_when_it_is_planned(english, tmp_path):
    """A stage without averaging; and a checkpoint from before [averaging] was added, before the first step."""
    run = copied(english, tmp_path)
    planned = trained(with_german(english, tmp_path, averaging="off"))
    averaged.forget_average(run / "english" / "step-00000009")
    saved = trained(with_german(english, tmp_path))

    assert (planned.status, saved.status) == (2, 2)
    assert "stages.german.init: stage 'english' keeps no average of its weights" in planned.output
    assert f"{run}/english/step-00000009: holds no average of its weights" in " ".join(saved.output.split())
    assert not (run / "german").exists()


def test_moments_of_the_weights_are_not_kept_for_their_average(base, tmp_path):
    """The config is refused, with what to do."""
    raw = german(base, tmp_path, "run", f"checkpoint:{base}/run/english/step-00000012@average", optimizer_state="keep")
    outcome = trained(raw)

    assert outcome.status == 2
    assert "stages.german.optimizer_state: the moments in the checkpoint belong to the weights" in outcome.output
