"""Benchmarks on checkpoints, during training and after: the run is unchanged, no score is lost or computed twice."""

import json
import shutil
import signal

import averaged
import pytest
import small_checkpoints
import training

pytest.importorskip("lm_eval", reason="needs lm-eval, which the test extra brings")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from titan_cpt.api import evaluate, open_checkpoint
from titan_cpt.cli import main
from titan_cpt.common.weights.named_weights import suffix_of
from titan_cpt.config.load import load_config
from titan_cpt.evaluation.scores import read_scores
from titan_cpt.training.benchmarks import run_benchmarks

pytestmark = training.THEIR_WARNINGS_IGNORED
TASKS = ("clams_de_local", "clams_en_local", "blimp_en_local")
PLACES = {("english", 5), ("english", 10), ("english", 12), ("german", 5), ("german", 10)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, tasks and runs."""
    folder = tmp_path_factory.mktemp("evaluated")
    training.write_languages(folder)
    small_checkpoints.write_minimal_pairs(folder)
    return folder


@pytest.fixture(scope="module")
def raw(folder):
    """A config with two stages, evaluated every five steps and at their ends, with TensorBoard."""
    asked = {"suite": "minimal_pairs", "every": 5, "tasks_dir": str(folder / "pairs" / "tasks")}
    return training.changed(training.two_stages(folder, folder), evaluation=asked, metrics={"enable_tensorboard": True})


def config(raw, folder, name, **tables):
    return training.write_config(training.changed(raw, job={"name": name}, **tables), folder / f"{name}.toml")


@pytest.fixture(scope="module")
def evaluated(raw, folder):
    """The completed run with benchmarks."""
    outcome = training.train(config(raw, folder, "evaluated"))

    assert outcome.status == 0, outcome.output
    return folder / "evaluated"


@pytest.fixture(scope="module")
def undisturbed(raw, folder):
    """The completed run without benchmarks."""
    plain = {**raw, "evaluation": {}}
    outcome = training.train(config(plain, folder, "undisturbed"))

    assert outcome.status == 0, outcome.output
    return folder / "undisturbed"


def scores_of(run):
    """(stage, steps, task) -> (value, digest of the samples)."""
    return {(s.stage, s.steps_done, s.task): (s.value, s.documents, s.samples) for s in read_scores(run)}


def command(*words):
    """Run the command in this process; returns its exit status."""
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    return left.value.code


def test_benchmarks_do_not_change_a_run(evaluated, undisturbed):
    """Every loss, gradient norm, LR and batch of both stages, and the final weights and moments are bit-identical."""
    assert training.numbers_of(evaluated) == training.numbers_of(undisturbed)
    for part in ("model", "optimizer"):
        last = [training.tensors_of(run / "german" / "step-00000010", part) for run in (evaluated, undisturbed)]
        assert training.same_bits(*last)


def test_every_score_is_in_the_runs_folder(evaluated):
    """After steps 5, 10 and each stage end: three tasks, the average, texts, a line in metrics.jsonl, a curve."""
    scores = scores_of(evaluated)
    events = [(event["stage"], event["step"]) for event in training.events_of(evaluated, "evaluation")]
    charts = EventAccumulator(str(evaluated / "tb")).Reload()
    mean = json.loads((evaluated / "evaluations/german/step-00000010/minimal_pairs.json").read_text())["average"]

    assert set(scores) == {(*place, task) for place in PLACES for task in TASKS}
    assert sorted(events) == sorted(PLACES)
    assert mean == pytest.approx(sum(scores["german", 10, task][0] for task in TASKS) / 3)
    assert len(list(evaluated.glob("evaluations/*/*/generations.json"))) == len(PLACES)
    assert [point.step for point in charts.Scalars("evaluation/minimal_pairs/average")] == [5, 10, 12, 17, 22]


def test_eval_reuses_scores_and_runs_only_missing_tasks(evaluated, folder, capsys):
    """Stored scores are printed as such; a removed one, and all of them under --again, come out the same."""
    run = folder / "copied"
    shutil.copytree(evaluated, run)
    before = scores_of(run)
    (run / "evaluations/german/step-00000010/clams_en_local-0shot.json").unlink()
    words = ("eval", run, "--suite", "minimal_pairs", "--tasks-dir", folder / "pairs" / "tasks")
    status, told = command(*words), capsys.readouterr().out
    again = command(*words, "--again", "--json")
    answer = json.loads(capsys.readouterr().out)

    assert (status, again) == (0, 0)
    assert told.count("stored score") == 5
    assert "last - first" in told
    assert scores_of(run) == before
    assert answer["changes"]["clams_de_local"]["value"] == pytest.approx(
        before["german", 10, "clams_de_local"][0] - before["english", 12, "clams_de_local"][0]
    )


def test_a_score_of_other_weights_is_not_reused(evaluated, folder, capsys):
    """The file of another checkpoint with this checkpoint's name: the task is run again."""
    run = folder / "mixed"
    shutil.copytree(evaluated, run)
    place = "evaluations/{}/clams_de_local-0shot.json"
    shutil.copyfile(run / place.format("english/step-00000005"), run / place.format("german/step-00000010"))
    words = ("--suite", "minimal_pairs", "--tasks", "clams_de_local", "--tasks-dir", folder / "pairs" / "tasks")
    status = command("eval", run / "german" / "step-00000010", *words)

    assert status == 0
    assert "stored score" not in capsys.readouterr().out
    assert scores_of(run) == scores_of(evaluated)


def test_a_killed_evaluation_loses_no_finished_task(raw, folder, evaluated):
    """The second run adds the missing tasks, and no value differs."""
    written = config(raw, folder, "killed")
    dead = training.train(written, fault=training.Fault("titan_cpt.evaluation.evaluate:_run_task", 5))
    kept = len(scores_of(folder / "killed"))
    outcome = training.train(written)

    assert dead.status == -signal.SIGKILL, dead.output
    assert kept == 4
    assert outcome.status == 0, outcome.output
    assert outcome.output.count("stored score") == 1
    assert scores_of(folder / "killed") == scores_of(evaluated)
    assert training.numbers_of(folder / "killed") == training.numbers_of(evaluated)


def test_a_signal_stops_an_evaluation_between_two_tasks(raw, folder, evaluated):
    """Exit status 75, finished scores are stored; the same command continues with the next task."""
    written = config(raw, folder, "signalled", evaluation={"every": 20})
    process = training.Process(written)
    first = folder / "signalled/evaluations/german/step-00000010/clams_de_local-0shot.json"
    process.wait_for(first.exists)
    process.send(signal.SIGTERM)
    stopped, resumed = process.end(), training.train(written)
    scores = scores_of(folder / "signalled")

    assert (stopped.status, resumed.status) == (75, 0), stopped.output + resumed.output
    assert {place[:2] for place in scores} == {("english", 12), ("german", 10)}
    assert all(score == scores_of(evaluated)[place] for place, score in scores.items())
    assert len(scores) == 6


def test_missing_datasets_are_reported_before_the_first_step(raw, folder):
    """Exit status 2 at the start of a new run; a running one logs the error and continues."""
    tasks = small_checkpoints.write_minimal_pairs(folder / "other")
    written = config(raw, folder, "missing", evaluation={"tasks_dir": str(tasks), "every": 5})
    lost = tasks.parent / "blimp_en.jsonl"
    content = lost.read_text()
    lost.unlink()
    refused = training.train(written)
    lost.write_text(content)
    process = training.Process(written)
    process.wait_for((folder / "missing/english/step-00000004/manifest.json").exists)
    lost.unlink()
    outcome = process.end()

    assert refused.status == 2
    assert "blimp_en_local" in refused.output
    assert not (folder / "missing/english").exists() or outcome.status == 0
    assert outcome.status == 0, outcome.output
    assert training.events_of(folder / "missing", "evaluation")[-1]["missing"] == ["blimp_en_local"]


@pytest.fixture(scope="module")
def with_average(raw, evaluated, folder):
    """The completed run, whose last checkpoint holds the weights of an earlier one as its average, scored again."""
    run = shutil.copytree(evaluated, folder / "averaged")
    average = training.tensors_of(run / "english" / "step-00000012")
    averaged.add_average(run / "german" / "step-00000010", average)
    written = config(raw, folder, "averaged")
    with training.built_trainer(load_config(written)) as trainer:
        assert run_benchmarks(trainer, trainer.plan.stage("german"), 10)
    return run


def test_benchmarks_of_a_run_score_the_average_beside_the_weights(with_average, evaluated):
    """Its scores and texts are those of the earlier checkpoint that it was made of; the weights keep theirs."""
    before = scores_of(evaluated)
    found = {(score.average, score.task): score.value for score in read_scores(with_average) if score.steps_done == 10}
    events = training.events_of(with_average, "evaluation")[-2:]
    texts = [
        json.loads((with_average / "evaluations" / place / "generations.json").read_text())["texts"]
        for place in ("german/step-00000010@average", "english/step-00000012")
    ]
    charts = EventAccumulator(str(with_average / "tb")).Reload()
    average = charts.Scalars("evaluation/minimal_pairs@average/average")

    assert found == {(False, task): before["german", 10, task][0] for task in TASKS} | {
        (True, task): before["english", 12, task][0] for task in TASKS
    }
    assert [event.get("weights") for event in events] == [None, "average"]
    assert [event["scores"]["average"] for event in events] == pytest.approx(
        [sum(before[stage, step, task][0] for task in TASKS) / 3 for stage, step in (("german", 10), ("english", 12))]
    )
    assert texts[0] == texts[1]
    assert [(point.step, point.value) for point in average] == [(22, pytest.approx(events[1]["scores"]["average"]))]


def test_eval_names_averages_and_reuses_their_scores(with_average, folder, capsys):
    """Of a run only the stage ends that hold one; beside the weights there is a column of its own."""
    words = ("--suite", "minimal_pairs", "--tasks-dir", folder / "pairs" / "tasks")
    end = with_average / "german" / "step-00000010"
    status, told = command("eval", end, f"{with_average}@average", *words), capsys.readouterr().out
    answer = evaluate([end, f"{with_average}@average"], suite="minimal_pairs", tasks_dir=folder / "pairs" / "tasks")

    assert status == 0
    assert told.count("stored score") == 6
    assert f"{end}@average" in told
    assert list(answer["checkpoints"]) == [str(end), f"{end}@average"]


def test_the_model_of_an_average_has_its_weights(with_average):
    """As Python loads it; it says which weights it has."""
    end = with_average / "german" / "step-00000010"
    loaded = {average: open_checkpoint(f"{end}{suffix_of(average)}") for average in (False, True)}
    expected = {False: training.tensors_of(end), True: training.tensors_of(with_average / "english/step-00000012")}

    assert [str(loaded[average].weights) for average in (False, True)] == [str(end), f"{end}@average"]
    for average, model in loaded.items():
        assert training.same_bits(dict(model.model.state_dict()), expected[average])
