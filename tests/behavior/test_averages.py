"""Averages of a stage's weights: by hand from saved weights, without effect on training, the same after a kill.

Steps 2, 4, ... of German are snapshots, the window has four of them; English begins to anneal after step 9, so its
snapshots are those of odd steps.
"""

import json
import math

import faulty
import pytest
import torch
import training
from training import Fault

pytestmark = training.THEIR_WARNINGS_IGNORED
SHAPES = {
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}
KINDS = [("mean", None), ("ema", None), *(("like_decay", shape) for shape in SHAPES)]


@pytest.fixture(scope="module")
def unaveraged(data, tmp_path_factory):
    """A run without averages, with every step's weights saved."""
    return run(data, tmp_path_factory.mktemp("plain"), {"checkpoint": {"interval": 1, "keep_latest_k": 99}})


def averaging(kind, shape=None, **keys):
    """The table [averaging]."""
    return {"kind": kind, "last": 8, "every": 2, **({"shape": shape} if shape else {}), **keys}


def run(data, out, tables=None, **faults):
    """Train two stages, to the end or to the fault; the run's folder."""
    raw = training.changed(training.two_stages(data, out), **(tables or {}))
    outcome = training.train(training.write_config(raw, out / "run.toml"), **faults)
    assert outcome.status == (-9 if faults else 0), outcome.output
    return out / "run"


def checkpoint(folder, stage, steps):
    return folder / stage / f"step-{steps:08d}"


def snapshots_until(stage, steps_done):
    """Steps of the snapshots of a stage so far, oldest first."""
    return [step for step in range(1, steps_done + 1) if step % 2 == (1 if stage == "english" else 0)]


def by_hand(unaveraged, stage, steps_done, kind, shape):
    """The average in float64, from the weights that the run without averages saved."""
    steps = snapshots_until(stage, steps_done)
    weights = [training.tensors_of(checkpoint(unaveraged, stage, step)) for step in steps]
    if kind == "ema":
        found = {name: tensor.double() for name, tensor in weights[0].items()}
        for number, snapshot in enumerate(weights[1:], 2):
            share = 1 / min(number, 4)
            found = {name: found[name] + share * (snapshot[name].double() - found[name]) for name in found}
        return found
    window = weights[-4:]
    if kind == "mean":
        return {name: sum(each[name].double() for each in window) / len(window) for name in window[0]}
    # The updates between the snapshots, each scaled down as an LR decay of this shape would have scaled it.
    before = steps[-len(window)] - 2
    start = training.tensors_of(checkpoint(unaveraged, stage, before)) if before > 0 else window[0]
    result = {name: tensor.double() for name, tensor in start.items()}
    previous = start
    for number, snapshot in enumerate(window):
        scale = SHAPES[shape](number / len(window))
        for name in result:
            result[name] = result[name] + scale * (snapshot[name].double() - previous[name].double())
        previous = snapshot
    return result


@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_the_average_is_the_one_computed_by_hand_and_training_does_not_change(data, tmp_path, unaveraged, kind, shape):
    """Every checkpoint of a run with averages: weights and moments have the same bits, the average is right."""
    tables = {"averaging": averaging(kind, shape), "checkpoint": {"interval": 5, "keep_latest_k": 99}}
    folder = run(data, tmp_path, tables)
    for stage, steps in (("english", 5), ("english", 9), ("english", 12), ("german", 5), ("german", 10)):
        saved, plain = checkpoint(folder, stage, steps), checkpoint(unaveraged, stage, steps)
        for part in ("model", "optimizer"):
            assert training.same_bits(training.tensors_of(saved, part), training.tensors_of(plain, part))
        expected = by_hand(unaveraged, stage, steps, kind, shape)
        average = training.tensors_of(saved, "average")
        assert average.keys() == expected.keys()
        for name, tensor in average.items():
            # An EMA rounds to float32 after every snapshot, the others once.
            torch.testing.assert_close(
                tensor, expected[name].float(), rtol=3e-7 if kind == "ema" else 1.2e-7, atol=1e-9
            )
    with_average, without = training.numbers_of(folder), training.numbers_of(unaveraged)
    assert without.items() <= with_average.items()
    labels = {dataset for kind, _, _, dataset in with_average if kind == "validation"}
    assert labels == {"en", "de", "en@average", "de@average"}


def test_the_loss_of_an_average_is_that_of_a_model_with_these_weights(data, tmp_path):
    """A stage that starts from an average has its loss at step 0; its forgetting is against the weights' own loss."""
    german = {"name": "german", "dataset": "de", "steps": 4, "lr": {"schedule": "constant", "max": 1e-3}}
    english = training.two_stages(data, tmp_path)["stages"][0]
    stages = [english, {**german, "init": "stage:english@average"}]
    folder = run(data, tmp_path, {"averaging": averaging("mean"), "stages": stages})
    numbers = training.numbers_of(folder)
    before = numbers["validation", "german", 0, "en"][0]
    assert numbers["validation", "english", 12, "en@average"][0] == before
    loss, _, forgetting = numbers["validation", "german", 4, "en@average"]
    assert forgetting == loss - before


def one_stage(data, out, kind, **keys):
    """The tables of a run of the English stage, with a checkpoint after every third step."""
    english = training.two_stages(data, out)["stages"][:1]
    checkpoints = {"interval": 3, "keep_latest_k": 99}
    return {"averaging": averaging(kind, **keys), "checkpoint": checkpoints, "stages": english}


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """A run of the English stage with each kind of average."""
    found = {}
    for kind in ("like_decay", "ema"):
        out = tmp_path_factory.mktemp(kind)
        found[kind] = run(data, out, one_stage(data, out, kind))
    return found


@pytest.mark.parametrize(
    ("kind", "where", "call"),
    [
        ("like_decay", "titan_cpt.training.weights.averager:Averager.take", 4),  # before a snapshot
        ("like_decay", "titan_cpt.training.weights.averager:Averager.average", 7),  # after one
        ("like_decay", "titan_cpt.train:Trainer.train_step", 12),  # the last step
        ("like_decay", "titan_cpt.training.validation:Validator.measure", 5),
        ("like_decay", "titan_cpt.train:Trainer.finish", 1),
        ("ema", "titan_cpt.training.weights.averager:Averager.take", 5),
        ("ema", "titan_cpt.train:Trainer.train_step", 7),
    ],
)
def test_a_killed_run_has_the_same_averages(data, tmp_path, unbroken, kind, where, call):
    """Killed inside the window and resumed: every average and every loss of it has the bits of an unbroken run."""
    tables = one_stage(data, tmp_path, kind)
    run(data, tmp_path, tables, fault=Fault(where, call))
    killed = run(data, tmp_path, tables)
    for steps in (3, 6, 9, 12):
        for part in ("model", "average", "snapshots"):
            ours, theirs = (
                training.tensors_of(checkpoint(each, "english", steps), part) for each in (killed, unbroken[kind])
            )
            assert training.same_bits(ours, theirs), (steps, part)
    assert training.numbers_of(killed) == training.numbers_of(unbroken[kind])


def test_an_average_with_other_settings_begins_anew(data, tmp_path):
    """A resumed run may change [averaging]: the weights are the same, and the run says that the average begins anew."""
    run(
        data,
        tmp_path,
        one_stage(data, tmp_path, "mean"),
        fault=Fault("titan_cpt.train:Trainer.train_step", 8, once_written=checkpoint(tmp_path / "run", "english", 6)),
    )
    tables = one_stage(data, tmp_path, "mean", every=1, last=2)
    raw = training.changed(training.two_stages(data, tmp_path), **tables)
    outcome = training.train(training.write_config(raw, tmp_path / "run.toml"))
    assert outcome.status == 0, outcome.output
    assert "begins anew" in " ".join(outcome.output.split())
    record = json.loads((checkpoint(tmp_path / "run", "english", 9) / "manifest.json").read_text())
    assert record["averaging"]["snapshots"] == [8, 9]
    assert record["averaging"]["count"] == 3  # after steps 7, 8 and 9


def test_a_branch_has_an_average_of_its_own_snapshots(data, tmp_path):
    """A branch from a stage's end, which holds no snapshots, begins a window there; so does one with others due.

    Reptile pulls in a branch that is longer than its stage, whose steps were too few for a pull.
    """
    schedule = {"schedule": "infinite_cosine", "max": 2e-3, "constant": 2e-3, "cooldown_until": 1, "constant_until": 6}
    tables = one_stage(data, tmp_path, "mean", last=4)
    tables["stages"][0] |= {"steps": 6, "lr": schedule, "reptile": {"every": 7, "step": 0.5}}
    folder = run(data, tmp_path, tables)
    for steps, tokens, expected in ((6, 192, {6: [4, 6], 9: [8]}), (3, 192, {3: [2], 6: [5]})):
        name = f"branch-{steps}"
        source = checkpoint(folder, "english", steps)
        arguments = ("anneal", str(source), "--tokens", str(tokens), "--job.name", name)
        output = tmp_path / f"{name}.txt"
        outcome = faulty.outcome_of(faulty.start(faulty.Life(arguments), output), output)
        assert outcome.status == 0, outcome.output
        assert ("takes its snapshots after other steps" in " ".join(outcome.output.split())) == (steps == 3)
        for done, snapshots in expected.items():
            record = json.loads((checkpoint(tmp_path / name, "english", done) / "manifest.json").read_text())
            assert record["averaging"]["snapshots"] == snapshots
