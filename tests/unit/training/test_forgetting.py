"""Forgetting is a difference of two losses on the same text, also when what validation measures changes in mid-run."""

import json
import shutil

import pytest
import training
from training import Fault, train

from titan_cpt.checkpoint.hf_export import export
from titan_cpt.reporting.summary import summarize
from titan_cpt.runs.anneal import branch_off
from titan_cpt.training.changed_validation import changed_datasets

pytestmark = training.THEIR_WARNINGS_IGNORED

FEWER = ("--validation.sequences", "3")
KEYS = ("loss_nats_per_token", "bits_per_byte", "forgetting_nats_per_token", "validation_id")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The two languages, and another text of English to measure on."""
    folder = training.write_languages(tmp_path_factory.mktemp("data"))
    training.write_tokens(folder / "other-validation", language=1, tokens=700, seed=2)
    return folder


@pytest.fixture(scope="module")
def raw(data):
    """Both stages; between their ends validation runs only at German's step 5."""
    return lambda out: training.two_stages(data, out)


@pytest.fixture(scope="module")
def unbroken(raw, tmp_path_factory):
    """The whole run with one set of windows, with which others are compared."""
    return whole(raw, tmp_path_factory.mktemp("six"))


@pytest.fixture(scope="module")
def killed(raw, tmp_path_factory):
    """A run killed in German's seventh step, after the checkpoint of its fourth."""
    folder = tmp_path_factory.mktemp("killed")
    config = training.write_config(raw(folder), folder / "config.toml")
    outcome = train(config, fault=Fault("titan_cpt.train:Trainer.train_step", 19, folder / "run/german/step-00000004"))
    assert "german/step-00000004" in training.checkpoints_of(folder / "run"), outcome.output
    return folder


def whole(raw, folder, *overrides):
    outcome = train(training.write_config(raw(folder), folder / "config.toml"), *overrides)
    assert outcome.status == 0, outcome.output
    return folder / "run"


@pytest.fixture
def resumed(killed, tmp_path):
    """resumed(*overrides, before=...): the killed run's copy, changed by `before`, trained to its end."""

    def resumed(*overrides, before=lambda run: None):
        shutil.copytree(killed, tmp_path / "copy")
        config = tmp_path / "copy" / "config.toml"
        config.write_text(config.read_text().replace(str(killed), str(tmp_path / "copy")))
        before(tmp_path / "copy" / "run")
        outcome = train(config, *overrides)
        assert outcome.status == 0, outcome.output
        return tmp_path / "copy" / "run", outcome.output

    return resumed


def measured(run, stage="german", after=5):
    """Validation losses from a step of a stage on, by (step, dataset); the last of lines written twice."""
    lines = [line for line in training.lines_of(run, "validation") if line["stage"] == stage and line["step"] >= after]
    return {(line["step"], line["dataset"]): [line.get(key) for key in KEYS] for line in lines}


def test_windows_changed_in_mid_run_give_the_forgetting_of_a_run_that_always_had_them(raw, unbroken, resumed, tmp_path):
    """Three windows in the place of six, from German's step 4 on: every number is that of three from the start."""
    reference = whole(raw, tmp_path / "three", *FEWER)
    run, output = resumed(*FEWER)
    (event,) = training.events_of(run, "validation_changed")
    again = [line for line in training.lines_of(run, "validation") if line.get("measured_again")]

    assert measured(run) == measured(reference) != measured(unbroken)
    assert measured(run)[10, "en"][2] is not None
    assert (event["stage"], event["step"], event["datasets"]) == ("german", 4, ["de", "en"])
    assert [(line["stage"], line["step"], line["dataset"]) for line in again] == [
        ("german", 0, "en"),
        ("german", 0, "de"),
    ]
    assert "the validation set has changed for de, en" in output
    export(run / "german" / "step-00000010", tmp_path / "out", dtype="float32", log=print)
    before, after = (measured(reference, after=0)[step, "en"][0] for step in (0, 10))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| german | en | {before:.4f} | {after:.4f} | 10 |" in card
    numbers, expected = training.numbers_of(run), training.numbers_of(unbroken)
    assert all(numbers[key] == expected[key] for key in expected if key[0] == "train"), "no weight is changed by it"
    for part in ("model", "optimizer"):
        ends = (training.tensors_of(each / "german" / "step-00000010", part) for each in (run, unbroken))
        assert training.same_bits(*ends)


def test_a_run_with_new_validation_data_is_not_refused(raw, data, resumed, tmp_path):
    """Another text of English: noted and marked, and forgetting is counted on that text."""
    other = ("--datasets.en.validation", str(data / "other-validation"))
    reference = whole(raw, tmp_path / "other", *other)
    run, output = resumed(*other)

    assert measured(run) == measured(reference)
    assert [event["datasets"] for event in training.events_of(run, "validation_changed")] == [["en"]]
    assert "has changed for en (data, windows or tokenizer)" in output


def test_settings_that_do_not_change_the_validation_loss_do_not_renew_baselines(unbroken, resumed, tmp_path):
    """The batch of a forward pass and the same text under another name: no mark, nothing is measured again."""

    def rename(run):
        text = (run.parent / "config.toml").read_text()
        prefix = next(line.split('"')[1] for line in text.splitlines() if "en-validation" in line)
        for suffix in (".bin", ".idx"):
            shutil.copy(f"{prefix}{suffix}", tmp_path / f"copy{suffix}")

    run, _ = resumed(
        "--validation.local_batch_size", "3", "--datasets.en.validation", str(tmp_path / "copy"), before=rename
    )
    expected = measured(unbroken)

    assert training.events_of(run, "validation_changed") == []
    assert not any("measured_again" in line for line in training.lines_of(run, "validation"))
    for key, numbers in measured(run).items():
        assert numbers[3] == expected[key][3]
        assert numbers[0] == pytest.approx(expected[key][0], rel=1e-6)
        assert numbers[2] == pytest.approx(expected[key][2], abs=1e-6)


def test_forgetting_is_unknown_where_the_weights_were_removed(resumed):
    """English's checkpoints were removed to save disk: training continues, and the line says null."""
    run, output = resumed(*FEWER, before=lambda run: shutil.rmtree(run / "english"))

    assert "forgetting of en is unknown from here on" in output
    assert [measured(run)[step, "en"][2] for step in (5, 10)] == [None, None]
    assert all(measured(run)[step, "en"][0] > 0 for step in (5, 10))


def as_before(run):
    """A record as older versions wrote it: it does not say what was measured."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("validation_id", None)
        line.pop("validation", None)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_of_an_older_version_measures_its_baseline_again(unbroken, resumed):
    """Its lines do not say what they measured: the same numbers come out, and there is no mark."""
    run, output = resumed(before=as_before)

    assert measured(run) == measured(unbroken)
    assert training.events_of(run, "validation_changed") == []
    assert "measured again at the start of stage german" in output


def test_other_windows_than_an_older_version_measured_are_marked(resumed):
    """Its lines do not say how many there were, its config.toml does: losses before and after are not comparable."""
    run, _ = resumed(*FEWER, before=as_before)
    (event,) = training.events_of(run, "validation_changed")
    stages = summarize(run)["stages"]

    assert event["datasets"] == ["de", "en"]
    assert [stage["not_comparable"] for stage in stages] == [[], []], "German's first weights were measured again"
    assert stages[1]["before"]["en"] == stages[1]["left_at"]["en"]


def test_a_stage_appended_with_other_windows_is_compared_with_them(raw, unbroken, tmp_path):
    """German's baseline is the new stage's own step 0; what English lost since German began is measured again."""

    def three_stages(out):
        raw_ = raw(out)
        raw_["datasets"]["fr"] = dict(raw_["datasets"]["de"], validation=raw_["datasets"]["en"]["validation"])
        raw_["stages"].append({**training.third_stage(), "name": "french", "dataset": "fr"})
        return raw_

    reference = whole(three_stages, tmp_path / "reference", *FEWER)
    shutil.copytree(unbroken, tmp_path / "run")
    run = whole(three_stages, tmp_path, *FEWER)
    again = [line for line in training.lines_of(run, "validation") if line.get("measured_again")]

    assert measured(run, "french", 0) == measured(reference, "french", 0)
    assert measured(run, "french", 0)[5, "en"][2] is not None
    assert {(line["stage"], line["step"]) for line in again} == {("german", 0)}
    (event,) = training.events_of(run, "validation_changed")
    assert (event["stage"], event["step"], event["datasets"]) == ("german", 10, ["de", "en"])


def test_a_branch_finds_its_baseline_in_the_run_that_it_left(raw, tmp_path):
    """German's annealing under other windows: English's baseline is measured on weights of the old run."""

    def infinite(out):
        raw_ = raw(out)
        constant = {"schedule": "infinite_cosine", "constant": 2e-3, "warmup_until": 0, "cooldown_until": 0}
        raw_["stages"][1]["lr"] = constant | {"constant_until": 1.0}
        return raw_

    found = []
    for name, overrides in (("always", FEWER), ("changed", ())):
        run = whole(infinite, tmp_path / name, *overrides)
        override = [(FEWER[0].removeprefix("--"), FEWER[1])]
        config, _ = branch_off(
            run / "german" / "step-00000010", tokens=4 * 64, min_lr=None, overrides=override, writes=True
        )
        branch = run.parent / config.job.name
        outcome = train(branch / "config.toml")
        assert outcome.status == 0, outcome.output
        found.append(measured(branch, after=11))

    assert found[0] == found[1]
    assert found[0][14, "en"][2] is not None


@pytest.mark.parametrize(
    ("last_start", "changed"),
    [
        ({}, []),
        ({"validation": {"x": "1", "y": "2"}}, []),
        ({"validation": {"x": "0", "y": "2", "gone": "3"}}, ["x"]),
        ({"validation": {"y": "0"}}, ["y"]),
        ({"data": {"datasets.x.validation": "a", "datasets.y.validation": "b"}}, []),
        ({"data": {"datasets.x.validation": "a", "datasets.y.validation": "c", "datasets.x.train": "d"}}, ["y"]),
        ({"data": {"datasets.x.validation": "c"}, "validation": {"x": "1"}}, []),
    ],
)
def test_only_datasets_that_both_sessions_measure_can_change(last_start, changed):
    """Datasets that come or go are no change; of an older version only the data is known."""
    data = {"datasets.x.validation": "a", "datasets.y.validation": "b"}

    assert changed_datasets(last_start, data, {"x": "1", "y": "2"}) == changed
