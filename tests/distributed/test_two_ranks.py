"""Two processes under torchrun against one: the same batches and losses, and each resumes the other's checkpoints."""

import os
import shutil
import subprocess
import sys

import pytest
import torch.distributed as dist
import training

from titan_cpt.checkpoint import manifest

pytestmark = [
    *training.THEIR_WARNINGS_IGNORED,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo"),
]


def train_on_two(config):
    """`torchrun --nproc-per-node 2 -m titan_cpt train`, to its end."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "titan_cpt", "train", "--config", str(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Two stages with replay; each rank takes micro-batches of one, so that two are accumulated on either."""
    folder = tmp_path_factory.mktemp("ranks")
    raw = training.two_stages(training.write_languages(folder), folder)
    return training.changed(raw, training={"local_batch_size": 1})


@pytest.fixture(scope="module")
def folder(raw):
    """Where the runs are."""
    return training.Path(raw["job"]["output_dir"])


@pytest.fixture(scope="module")
def one(raw, folder):
    """The run of one process."""
    outcome = training.train(training.write_config(training.changed(raw, job={"name": "one"}), folder / "one.toml"))

    assert outcome.status == 0, outcome.output
    return folder / "one"


@pytest.fixture(scope="module")
def two(raw, folder):
    """The run of two."""
    train_on_two(training.write_config(training.changed(raw, job={"name": "two"}), folder / "two.toml"))
    return folder / "two"


def forget_the_end(run, new):
    """A copy of a run that has reached step 4 of German."""
    shutil.copytree(run, new)
    for name in ("german/step-00000010", "german/step-00000008"):
        shutil.rmtree(new / name)


def assert_alike(first, second):
    """The last line of every step and measurement: hash, LR and counts are equal, losses and norms close."""
    a, b = training.numbers_of(first), training.numbers_of(second)

    assert a.keys() == b.keys()
    assert len([key for key in a if key[0] == "train"]) == 22
    for key in a:
        if key[0] == "train":
            (loss, norm, *exact), (other_loss, other_norm, *other_exact) = a[key], b[key]
            of_sources, of_other_sources = exact.pop(4), other_exact.pop(4)

            # Losses by source, of which the last ones are of replay, and numbers of tokens by source.
            assert of_sources == pytest.approx(of_other_sources, abs=1e-5)
            assert exact.pop(5) == pytest.approx(other_exact.pop(5), abs=1e-5)
            assert exact == other_exact
            assert loss == pytest.approx(other_loss, abs=1e-5)
            assert norm == pytest.approx(other_norm, rel=1e-4)
        else:
            assert a[key] == pytest.approx(b[key], abs=2e-5)  # forgetting may be None on both sides


def test_two_ranks_train_as_one_does(one, two):
    """Both stages, replay, the start from the pre-anneal checkpoint and kept moments, sharded and not."""
    assert_alike(one, two)
    assert training.checkpoints_of(one) == training.checkpoints_of(two)


def test_a_checkpoint_of_two_ranks_holds_the_whole_model(one, two):
    """Names and shapes are one process's; weights close; the manifest covers the files of both ranks."""
    name = "english/step-00000009"
    ours, theirs = training.tensors_of(two / name), training.tensors_of(one / name)
    record = manifest.verify(two / name)

    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    assert all((ours[key] - theirs[key]).abs().max() < 2e-3 for key in theirs if theirs[key].dim() == 2)
    assert record["world_size"] == 2
    assert {name[:10] for name in record["files"]} == {"rank-00000", "rank-00001", "index.json"}


def test_only_one_rank_writes_the_record(two):
    """A line for every step and one for every measurement, from an undisturbed run."""
    assert len(training.lines_of(two, "train")) == 22
    assert len(training.lines_of(two, "validation")) == 2 * (4 + 3)
    assert [event["world_size"] for event in training.events_of(two, "start")] == [2]


def test_one_process_resumes_from_a_checkpoint_of_two(raw, folder, one, two):
    """From step 4 of German: the same batches, and the losses of both unbroken runs."""
    run = folder / "two-then-one"
    forget_the_end(two, run)
    config = training.write_config(training.changed(raw, job={"name": run.name}), folder / f"{run.name}.toml")
    outcome = training.train(config)

    assert outcome.status == 0, outcome.output
    assert training.events_of(run, "resume")[0]["step"] == 4
    assert len(training.lines_of(run, "train")) == 22 + 6  # the copy's lines, and steps 5 to 10 again
    assert_alike(one, run)


def test_two_processes_resume_from_a_checkpoint_of_one(raw, folder, one):
    """The reverse, from step 4 of German."""
    run = folder / "one-then-two"
    forget_the_end(one, run)
    config = training.write_config(training.changed(raw, job={"name": run.name}), folder / f"{run.name}.toml")
    train_on_two(config)

    assert training.events_of(run, "resume")[0]["step"] == 4
    assert len(training.lines_of(run, "train")) == 22 + 6  # the copy's lines, and steps 5 to 10 again
    assert_alike(one, run)
