"""Stages that train new rows, on two FSDP ranks of which only the second has any, against one process."""

import shutil

import extended
import pytest
import torch
import torch.distributed as dist
import training
from distributed.test_two_ranks import train_on_two
from extended import BASE_VOCABULARY as B

pytestmark = [
    *training.THEIR_WARNINGS_IGNORED,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo"),
]
LATER = {"rows": ["rows/step-00000004", "norm", "all"], "norm": ["norm/step-00000004", "all"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the runs are."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def raw(folder):
    """The config of four stages."""
    return extended.four_stages(folder)


@pytest.fixture(scope="module")
def one(raw, folder):
    """The run of one process."""
    outcome = training.train(training.write_config(raw, folder / "run.toml"))

    assert outcome.status == 0, outcome.output
    return folder / "run"


def from_the_middle_of(run, stage, name, raw):
    """A copy of a run as it was after two steps of a stage, and its config."""
    folder = run.parent
    shutil.copytree(run, folder / name)
    for each in LATER[stage]:
        shutil.rmtree(folder / name / each)
    return training.write_config(training.changed(raw, job={"name": name}), folder / f"{name}.toml")


@pytest.fixture(scope="module")
def two(raw, folder, one):
    """The run of one process, resumed by two in the middle of the stage that trains new rows."""
    train_on_two(from_the_middle_of(one, "rows", "two", raw))
    return folder / "two"


def assert_alike(run, expected):
    """Norms and losses of every step, and weights and moments at the end of each stage, are close."""
    found, wanted = training.numbers_of(run), training.numbers_of(expected)
    assert found.keys() == wanted.keys()
    for key in found:
        if key[0] == "train":
            assert found[key][:2] == pytest.approx(wanted[key][:2], rel=1e-4)
    for stage in ("rows", "norm", "all"):
        end = f"{stage}/step-00000004"
        for part in ("model", "optimizer"):
            ours, theirs = training.tensors_of(run / end, part), training.tensors_of(expected / end, part)
            assert ours.keys() == theirs.keys()
            for name, tensor in theirs.items():
                torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-4, msg=lambda text, n=name: n + text)


def test_two_ranks_resume_and_train_rows_as_one_process_does(one, two):
    """From the moments of one process, of which the first rank reads nothing; 384 rows, new ones from 257 on."""
    assert_alike(two, one)
    assert training.events_of(two, "resume")[0]["step"] == 2


def test_old_rows_and_frozen_weights_stay_bit_equal_on_two_ranks(two):
    before = training.tensors_of(two / "english" / "step-00000004")
    after = training.tensors_of(two / "norm" / "step-00000004")
    state = training.tensors_of(two / "norm" / "step-00000004", "optimizer")

    for name in before:
        if name in ("embedding.weight", "head.weight"):
            assert torch.equal(before[name][:B], after[name][:B])
            assert not state[f"state.{name}.exp_avg"][:B].any()
            assert state[f"state.{name}.step"] == 8
        elif not name.startswith("final_norm"):
            assert torch.equal(before[name], after[name])


def test_one_process_resumes_what_two_have_saved(raw, folder, one, two):
    outcome = training.train(from_the_middle_of(two, "norm", "one-again", raw))

    assert outcome.status == 0, outcome.output
    assert_alike(folder / "one-again", one)
