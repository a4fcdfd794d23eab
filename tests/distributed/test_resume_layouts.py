"""A resume under another layout: every one to every other of 1, 2 and 4 ranks, the state exact, the losses close."""

import json
import math
import shutil

import faulty
import numpy as np
import pytest
import torch
import training
from averaged import replace_weights
from equal_gradients import take_steps
from faulty import Life
from layouts import END, LAYOUTS, MENDED, MUON, PULLED, STEP, WEAK
from parity_launch import TOML, make_data

from titan_cpt.common.run_folder import INTERVAL
from titan_cpt.config.load import load_config
from titan_cpt.training.saving import save_checkpoint

pytestmark = training.THEIR_WARNINGS_IGNORED

AVERAGING = '[averaging]\nkind = "like_decay"\nlast = 4\nevery = 1\n'
NAMES = [(ranks, name) for ranks, of_ranks in LAYOUTS.items() for name in of_ranks]


def on_ranks(ranks, function, folder):
    """Call a function of layouts.py on `ranks` ranks."""
    life = Life((str(folder),), main=f"layouts:{function}")
    ended = [faulty.outcome_of(*one) for one in faulty.start_all(life, folder / "layouts", ranks=ranks)]

    assert [one.status for one in ended] == [0] * ranks, "\n".join(one.output for one in ended)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The folder of all runs."""
    return training.once_for_all_workers(tmp_path_factory.getbasetemp(), "layouts", make_runs)


def make_runs(folder):
    """The run of one process, its step 2 rewritten by every layout, and those rewritten and resumed by every layout."""
    make_data(folder)
    toml = (
        TOML.replace('"outputs"', f'"{folder}"').replace('"pages', f'"{folder}/pages').replace("steps = 3", "steps = 4")
    )
    toml = toml.replace(f'dataset = "{folder}/pages"', 'dataset = "pages"').replace('name = "base"', 'name = "one"')
    toml = toml.replace("steps = 4\n", "steps = 4\nreptile = { every = 3, step = 0.3 }\n", 1)
    (folder / "run.toml").write_text(f"{toml}[checkpoint]\ninterval = 2\nkeep_latest_k = 9\n{AVERAGING}")
    outcome = training.train(folder / "run.toml")

    assert outcome.status == 0, outcome.output
    with training.built_trainer(load_config(folder / "run.toml", [*MUON.items(), ("job.name", "muon-one")])) as trainer:
        take_steps(trainer)
        save_checkpoint(trainer, trainer.plan.stages[0], 2, INTERVAL)
        trainer.checkpoints.wait()
    make_weak(folder / "one" / STEP, folder / WEAK)
    for ranks in (2, 4):
        on_ranks(ranks, "write", folder)
    for ranks in (1, 2, 4):
        on_ranks(ranks, "read", folder)


def make_weak(checkpoint, folder):
    """A copy of a checkpoint with a row of zeros, in the embedding, and two of NaN in the head."""
    shutil.copytree(checkpoint, folder)
    weights = training.tensors_of(folder)
    weights["embedding.weight"][97] = 0
    weights["head.weight"][[98, 300]] = float("nan")
    replace_weights(folder, weights)


@pytest.mark.parametrize(("ranks", "name"), NAMES)
def test_a_resume_reads_every_layouts_checkpoint_into_the_same_bits(folder, ranks, name):
    """Ten writers, one reader: on each rank the shards of weights, moments and step counts are the same ten times."""
    told = [json.loads((folder / f"to-{name}" / f"digests-{rank}.json").read_text()) for rank in range(ranks)]

    assert [len(digests) for digests in told] == [len(NAMES)] * ranks
    assert [len(set(digests.values())) for digests in told] == [1] * ranks


@pytest.mark.parametrize("part", ["model", "optimizer", "average", "snapshots", "reptile"])
@pytest.mark.parametrize(("ranks", "name"), NAMES)
def test_a_resume_under_a_layout_holds_the_state_of_one_process_exactly(folder, ranks, name, part):
    """Each layout reads a checkpoint and writes it at once: its tensors are bit for bit those of the one process.

    So are the average of the weights, which each rank computes from its own shards, and the two snapshots behind it.
    """
    one = training.tensors_of(folder / "one" / STEP, part)
    assert len(one) == len(training.tensors_of(folder / "one" / STEP)) * {"optimizer": 3, "snapshots": 2}.get(part, 1)
    for run in (name, f"to-{name}"):
        assert training.same_bits(one, training.tensors_of(folder / run / STEP, part))


@pytest.mark.parametrize("part", ["model", "optimizer"])
@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, name in NAMES if ranks > 1])
def test_muon_under_a_layout_is_that_of_one_process_bit_for_bit(folder, ranks, name, part):
    """Three steps with equal gradients: the blocks' weights and momentum, which FSDP2, TP, PP and HSDP shard."""
    one, found = (training.tensors_of(folder / run / STEP, part) for run in ("muon-one", f"muon-{name}"))
    ours = {key for key in one if "blocks." in key and one[key].ndim == 2}

    assert found.keys() == one.keys()
    assert len(ours) == 4 * 4
    assert training.same_bits({key: one[key] for key in ours}, {key: found[key] for key in ours})


@pytest.mark.parametrize(("ranks", "name"), NAMES[1:])
def test_weak_rows_are_replaced_by_the_same_bits_under_every_layout(folder, ranks, name):
    """The mean of the other tokens' rows of the file, in whichever shards the rows are; nothing else changes."""
    expected = training.tensors_of(folder / WEAK)
    for weight, weak in (("embedding.weight", [97]), ("head.weight", [98, 300])):
        others = [number for number in range(257) if number not in weak]
        columns = expected[weight][others].double().numpy().T
        expected[weight][weak] = torch.tensor([math.fsum(column) / len(others) for column in columns])

    assert training.same_bits(expected, training.tensors_of(folder / name / MENDED))


@pytest.mark.parametrize("ranks", [2, 4])
def test_muon_does_not_depend_on_how_odd_matrices_are_sharded(folder, ranks):
    """One row over four ranks, seven rows, columns sharded, replicas: the bits of one process."""
    assert [json.loads((folder / f"unequal-{ranks}-{rank}.json").read_text()) for rank in range(ranks)] == [[]] * ranks


@pytest.mark.parametrize(("ranks", "name"), NAMES)
def test_a_resume_under_another_layout_trains_on_the_same_batches(folder, ranks, name):
    """Steps 3 and 4 compared with those of an uninterrupted run: equal hashes, losses within 1e-5."""
    expected, found = (training.numbers_of(folder / run) for run in ("one", f"to-{name}"))
    steps = [("train", "first", step, None) for step in (3, 4)]

    # LR, hash, tokens and step; losses by source come next, then tokens by source.
    assert [found[step][2:6] for step in steps] == [expected[step][2:6] for step in steps]
    assert [found[step][7] for step in steps] == [expected[step][7] for step in steps]
    for step in steps:
        assert found[step][6] == pytest.approx(expected[step][6], abs=1e-5)
    assert [found[step][0] for step in steps] == pytest.approx([expected[step][0] for step in steps], abs=1e-5)


@pytest.mark.parametrize(("ranks", "name"), NAMES[1:])
def test_a_pull_under_a_layout_is_that_of_numpy_on_the_whole_weights(folder, ranks, name):
    """old + 0.3 (new - old) in float32, bit for bit, on shards of every kind; the pulled weights are the old ones."""
    new, old = (training.tensors_of(folder / "one" / STEP, part) for part in ("model", "reptile"))
    expected = {key: old[key].numpy() + np.float32(0.3) * (new[key].numpy() - old[key].numpy()) for key in new}
    found = (training.tensors_of(folder / name / PULLED, part) for part in ("model", "reptile"))

    for part in found:
        assert training.same_bits({key: torch.from_numpy(value) for key, value in expected.items()}, part)
    assert not training.same_bits(new, old)


@pytest.mark.parametrize(("ranks", "name"), NAMES)
def test_the_average_of_a_run_that_changed_its_layout_is_that_of_one_process(folder, ranks, name):
    """With two snapshots of its own: its loss is within 1e-5, and it is no further away than the weights are."""
    expected, found = (training.numbers_of(folder / run) for run in ("one", f"to-{name}"))
    one, other = (
        {part: training.tensors_of(folder / run / END, part) for part in ("model", "average")}
        for run in ("one", f"to-{name}")
    )
    of_weights, of_average = (
        max(float((one[part][key] - other[part][key]).abs().max()) for key in one[part]) for part in one
    )

    assert found["validation", "first", 4, "pages@average"][0] == pytest.approx(
        expected["validation", "first", 4, "pages@average"][0], abs=1e-5
    )
    assert of_average <= of_weights + 1e-7
    assert expected["validation", "first", 4, "pages@average"][0] != expected["validation", "first", 4, "pages"][0]
