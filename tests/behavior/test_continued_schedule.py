"""One LR schedule over several stages: a run that is cut into stages is bit for bit the run of one stage.

In fp32 with one process and one thread, where equal means equal to the last bit.
"""

import gc
import shutil

import pytest
import training
from training import Fault, train

from titan_cpt.checkpoint import manifest
from titan_cpt.errors import CheckpointError
from titan_cpt.train import run

pytestmark = training.THEIR_WARNINGS_IGNORED

CONTINUE = {"schedule": "continue"}
COSINE = {"schedule": "cosine", "max": 3e-3, "warmup_until": 9}
WSD = {"schedule": "wsd", "max": 3e-3, "warmup_until": 2, "decay_from": 7, "decay": "linear"}
NUMBERS = ("loss_nats_per_token", "grad_norm", "lr", "batch_hash", "tokens")


@pytest.fixture(autouse=True)
def garbage_is_collected_again():
    """A run disables Python's garbage collector, as its process ends with it; the test process continues."""
    yield
    gc.enable()


def config(data, folder, *stages):
    """A run of both languages, half each: two sequences of each in a batch. A loss is compared with ten before."""
    raw = training.changed(
        training.two_stages(data, folder),
        training={"on_loss_spike": "skip", "loss_spike_window": 10, "loss_spike_z_score": 50.0},
        checkpoint={"interval": 3, "keep_latest_k": 5},
        validation={"interval": 50},
    )
    return raw | {"stages": [{"dataset": {"en": 0.5, "de": 0.5}, **stage} for stage in stages]}


def one_stage(lr):
    """Twelve steps."""
    return [{"name": "a", "steps": 12, "lr": lr}]


def two_stages(lr):
    """The same twelve steps: seven, and five that continue."""
    return [{"name": "a", "steps": 7, "lr": lr}, {"name": "b", "steps": 5, "lr": CONTINUE}]


def trained(raw):
    """The folder of the run, trained in this process."""
    assert run(training.config_of(raw)) == 0
    return training.Path(raw["job"]["output_dir"]) / "run"


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of one stage with a cosine."""
    return trained(config(data, tmp_path_factory.mktemp("whole"), *one_stage(COSINE)))


def assert_same_run(cut, whole):
    """Every number of every step, and the last weights, moments, step counts and recent losses."""
    steps = {}
    for folder in (cut, whole):
        lines = {line["run_step"]: line for line in training.lines_of(folder, "train")}
        steps[folder] = {step: [line.get(name) for name in NUMBERS] for step, line in lines.items()}
    assert len(steps[whole]) == 12
    assert steps[cut] == steps[whole]
    ends = cut / "b" / "step-00000005", whole / "a" / "step-00000012"
    windows = [manifest.read(end)["recent_losses"] for end in ends]
    assert windows[0] == windows[1]
    assert len(windows[0]) == 10
    for part in ("model", "optimizer"):
        assert training.same_bits(*(training.tensors_of(end, part) for end in ends))


def test_two_stages_under_one_schedule_are_the_run_of_one_stage(data, whole, tmp_path):
    """With the moments, the step count and the losses that the next one is compared with; the LR warms up in both."""
    cut = trained(config(data, tmp_path, *two_stages(COSINE)))
    transition = training.events_of(cut, "transition")[-1]

    assert_same_run(cut, whole)
    assert transition["optimizer"] == "moments and step count kept"
    assert transition["lr"].endswith("at the first step, in the schedule of a")


def test_a_run_killed_between_two_stages_of_a_schedule_resumes_as_if_never_killed(data, whole, tmp_path):
    """Killed when the checkpoint at the end of the first stage is whole and the second stage has not begun."""
    path = training.write_config(config(data, tmp_path, *two_stages(COSINE)), tmp_path / "c.toml")
    border = tmp_path / "run" / "a" / "step-00000007"
    killed = train(path, fault=Fault("titan_cpt.train:begin_stage", call=2, once_written=border))
    resumed = train(path)

    assert (killed.status, resumed.status) == (-9, 0), resumed.output
    assert_same_run(tmp_path / "run", whole)


def test_a_stage_that_changes_the_lr_of_trained_steps_is_refused_and_others_may_be_appended(data, tmp_path):
    """A cosine over 7 steps is not the beginning of one over 12; a stable phase of 7 steps is, whatever follows."""
    cosine = {**COSINE, "warmup_until": 3}
    finished = trained(config(data, tmp_path / "cosine", *two_stages(cosine)[:1]))
    with pytest.raises(CheckpointError) as refused:
        run(training.config_of(config(data, tmp_path / "cosine", *two_stages(cosine))))

    message = " ".join(str(refused.value).split())
    assert "stages.a.lr.span_steps: not set -> 12" in message
    assert "spans the stages that continue it" in message
    assert "infinite or wsd schedule whose constant phase lasts to the end of the trained stage" in message
    assert "may be changed freely" not in message
    assert finished.exists()

    at_once = trained(config(data, tmp_path / "at_once", *two_stages(WSD)))
    appended = trained(config(data, tmp_path / "appended", *two_stages(WSD)[:1]))
    appended = trained(config(data, tmp_path / "appended", *two_stages(WSD)))

    assert training.numbers_of(appended) == training.numbers_of(at_once)
    assert (at_once / "b" / "step-00000000").exists()  # the pre-anneal checkpoint, where the decay begins


def test_a_skipped_batch_counts_for_the_limit_across_the_border(data, tmp_path):
    """Two in the first stage and one in the second are three of the last 1000 steps of this schedule."""
    from titan_cpt.training.bad_steps import choose_response

    raw = config(data, tmp_path, *two_stages(COSINE))
    raw["training"] |= {"max_skips_per_1000_steps": 3, "on_nonfinite": "skip"}
    line = {"step": 4, "loss_nats_per_token": float("nan"), "grad_norm": 1.0}
    with training.built_trainer(training.config_of(raw)) as trainer:
        stage = trainer.plan.stages[1]
        trainer.skipped.add("a", 2)
        trainer.skipped.add("a", 5)
        below = choose_response(trainer, stage, line)
        trainer.skipped.add("b", 1)

        assert (below, choose_response(trainer, stage, line)) == ("skip", "stop")


def test_an_annealed_branch_of_a_stage_that_continues_a_schedule(data, tmp_path, capsys):
    """From step 3 of b, 10 of the schedule: two stages, whose schedule decays over the two steps that are added."""
    from titan_cpt.cli import main

    stable = {**WSD, "decay_from": 1.0}
    trunk = trained(config(data, tmp_path, *two_stages(stable)))
    with pytest.raises(SystemExit) as left:
        main(["anneal", str(trunk / "b" / "step-00000003"), "--tokens", "128"])
    branch = trunk.parent / "run-anneal-b-3"
    planned = config(data, tmp_path / "planned", *two_stages({**WSD, "decay_from": 10}))
    planned["stages"][1]["steps"] = 5

    assert left.value.code == 0, capsys.readouterr().err
    assert training.numbers_of(branch) == training.numbers_of(trained(planned))
    shutil.rmtree(branch)
