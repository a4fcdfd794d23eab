"""Reading an average: it is loaded and exported as the weights, and a checkpoint without one says which have one."""

import shutil

import averaged
import pytest
import torch
import training
from safetensors.torch import load_file

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.averages import describe_average, require_same_averaging, require_weights
from titan_cpt.checkpoint.hf_export import export
from titan_cpt.checkpoint.state_dict import load_state
from titan_cpt.cli import main
from titan_cpt.common.weights.named_weights import NamedWeights
from titan_cpt.errors import CheckpointError
from titan_cpt.models.build import build_model
from titan_cpt.models.huggingface_weights import hub_names
from titan_cpt.models.registry import named_size

pytestmark = training.THEIR_WARNINGS_IGNORED
SPEC = named_size("gpt_neox", "debug", 257)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two stages that keeps every checkpoint; the last one has the mean of two as its average."""
    folder = tmp_path_factory.mktemp("averaged")
    raw = training.two_stages(training.write_languages(folder), folder)
    raw = training.changed(raw, checkpoint={"interval": 4, "keep_latest_k": 9}, validation={"interval": 100})
    outcome = training.train(training.write_config(raw, folder / "run.toml"))

    assert outcome.status == 0, outcome.output
    return folder / "run"


@pytest.fixture(scope="module")
def mean(run):
    """The float64 mean of the weights after 4 and 8 steps of German, rounded to float32."""
    return averaged.mean_of([training.tensors_of(run / "german" / f"step-0000000{step}") for step in (4, 8)])


@pytest.fixture
def checkpoint(run, mean, tmp_path):
    """A copy of the run's end with the mean as its average."""
    shutil.copytree(run, tmp_path / "run")
    return averaged.add_average(tmp_path / "run" / "german" / "step-00000010", mean)


def test_an_export_of_the_average_has_the_bits_of_the_mean_computed_by_hand(checkpoint, mean, tmp_path):
    """In float32; the name of each weight is the one that transformers reads. The card says what was exported."""
    export(NamedWeights(checkpoint, average=True), tmp_path / "out", dtype="float32", log=lambda line: None)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    names = hub_names(SPEC)

    assert training.same_bits(exported, {names[name]: weight for name, weight in mean.items()})
    card = (tmp_path / "out" / "README.md").read_text()

    assert "# run: german@average, step 10" in card
    assert "- Weights: mean of 2 snapshots of its weights, every 4 steps until step 8" in card


def test_the_command_exports_the_average_that_its_path_names(checkpoint, mean, tmp_path, capsys):
    """As the command line gives it."""
    with pytest.raises(SystemExit) as ended:
        main(["export", f"{checkpoint}@average", str(tmp_path / "out"), "--dtype", "float32"])

    assert ended.value.code == 0, capsys.readouterr()
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(exported["gpt_neox.embed_in.weight"], mean["embedding.weight"])


def test_the_weights_beside_an_average_are_loaded_as_before(checkpoint, run):
    """An average changes nothing for those who do not name it."""
    raw, average = build_model(SPEC), build_model(SPEC)
    load_state(checkpoint, raw, None)
    load_state(checkpoint, average, None, average=True)

    assert training.same_bits(dict(raw.state_dict()), training.tensors_of(run / "german" / "step-00000010"))
    assert training.same_bits(dict(average.state_dict()), training.tensors_of(checkpoint, "average"))


def test_a_checkpoint_without_an_average_says_which_ones_of_its_run_have_one(checkpoint):
    """By stage and step."""
    other = checkpoint.parents[1] / "english" / "step-00000012"
    with pytest.raises(CheckpointError) as refused:
        require_weights(NamedWeights(other, average=True), manifest.read(other))

    assert str(refused.value) == (
        f"{other}: holds no average of its weights; checkpoints of its run with an average: german at step 10"
    )


def test_a_run_without_averages_is_refused_with_the_key_that_makes_them(run):
    """The message names [averaging]."""
    folder = run / "german" / "step-00000010"
    with pytest.raises(CheckpointError, match=r"nor does any checkpoint beside it: .* \[averaging\]"):
        require_weights(NamedWeights(folder, average=True), manifest.read(folder))


def test_verify_says_what_the_average_is_or_that_there_is_none(checkpoint, capsys):
    """Exit status 0 with it, 2 without."""
    statuses = []
    for folder in (checkpoint, checkpoint.parent / "step-00000004"):
        with pytest.raises(SystemExit) as ended:
            main(["verify", f"{folder}@average"])
        statuses.append(ended.value.code)
    printed = capsys.readouterr()

    assert statuses == [0, 2]
    assert f"{checkpoint}@average: good" in printed.out
    assert "step-00000004: holds no average of its weights" in printed.err


def test_a_command_that_continues_training_refuses_an_average(checkpoint, capsys):
    """`anneal` needs the optimizer state, which belongs to the weights."""
    with pytest.raises(SystemExit) as ended:
        main(["anneal", f"{checkpoint}@average", "--tokens", "128"])

    assert ended.value.code == 2
    assert f"names an average, and a checkpoint with its optimizer state is needed here: name {checkpoint}" in (
        capsys.readouterr().err
    )


def test_an_average_of_another_dtype_is_damage(checkpoint, mean):
    """float32 is the format."""
    averaged.add_average(checkpoint, {name: weight.bfloat16() for name, weight in mean.items()})
    with pytest.raises(CheckpointError, match="cannot be loaded into this model"):
        load_state(checkpoint, build_model(SPEC), None, average=True)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (averaged.ENTRY, "mean of 2 snapshots of its weights, every 4 steps until step 8"),
        (
            {"kind": "like_decay", "shape": "sqrt", "snapshots": [7]},
            "mean weighted like an LR decay (sqrt) of 1 snapshot ",
        ),
        ({"kind": "ema", "snapshots": [1000, 1500], "count": 30}, "exponential moving average of 30 snapshots of "),
        ({"kind": ["odd"], "snapshots": "none"}, "average of its weights"),
        ("odd", "average of its weights"),
    ],
)
def test_an_average_is_described_from_the_manifest(entry, text):
    """In model cards and by `verify`; a damaged entry ends no command."""
    assert describe_average({"averaging": entry}).startswith(text)


def test_an_average_of_other_settings_than_the_plans_is_refused(tmp_path):
    """With what differs; a key that only the manifest has does not count."""
    record = {"averaging": averaged.ENTRY}
    require_same_averaging(tmp_path, record, {"kind": "mean", "size": 2, "every": 4})
    with pytest.raises(
        CheckpointError, match=r"with other settings than \[averaging\] has now: every: 4 -> 2; size: 2 -> 5"
    ):
        require_same_averaging(tmp_path, record, {"kind": "mean", "size": 5, "every": 2})
