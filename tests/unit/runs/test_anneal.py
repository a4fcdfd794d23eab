"""`titan-cpt anneal`: a branch has bit for bit the result of the same config trained from the start."""

import gc
import json
import os
import shutil
import signal

import pytest
import training

from titan_cpt.checkpoint import manifest
from titan_cpt.cli import main
from titan_cpt.common.run_folder import locked
from titan_cpt.config.load import load_config
from titan_cpt.data.inventory import take_inventory
from titan_cpt.planning.planner import make_plan
from titan_cpt.train import run

pytestmark = training.THEIR_WARNINGS_IGNORED

STEP_TOKENS = 64


@pytest.fixture(autouse=True)
def garbage_is_collected_again():
    """A run disables Python's garbage collector, as its process ends with it; the test process continues."""
    yield
    gc.enable()


def infinite_twice(folder):
    """English with its own RoPE and a warmed-up optimizer state, then German with replay and Reptile.

    Both schedules are infinite, with end points between two steps.
    """
    raw = training.two_stages(training.write_languages(folder), folder)
    raw = training.changed(raw, checkpoint={"interval": 2, "keep_latest_k": 20})
    raw["stages"][0] |= {"rope": {"base": 500.0}, "optimizer_state": "warm:9"}
    raw["stages"][1] |= {"reptile": {"every": 3, "step": 0.5}}
    raw["stages"][0]["lr"] |= {"warmup_until": 0.07, "cooldown_until": 0.29}
    raw["stages"][1]["lr"] = {
        "schedule": "infinite_inv_sqrt",
        "constant": 2e-3,
        "warmup_until": 0,
        "cooldown_until": 0,
        "constant_until": 1.0,
    }
    return raw


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """The run from which the branches start, trained to its end; 12 and 10 steps."""
    raw = infinite_twice(tmp_path_factory.mktemp("trunk"))

    assert run(training.config_of(raw)) == 0
    return training.Path(raw["job"]["output_dir"]) / "run"


def command(*words):
    """The exit status of titan-cpt in this process."""
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    return left.value.code


def from_the_start(branch, name):
    """The folder of a run of the branch's config that is trained from the start, under another name."""
    raw = load_config(branch / "config.toml").model_dump(mode="json", by_alias=True, exclude_none=True)
    raw["job"]["name"] = name

    assert run(training.config_of(raw)) == 0
    return branch.parent / name


def assert_same_result(branch, whole, end):
    """Equal metrics, those before the branch included, and equal weights and optimizer state at the end."""
    assert training.numbers_of(branch) == training.numbers_of(whole)
    for part in ("model", "optimizer"):
        assert training.same_bits(training.tensors_of(branch / end, part), training.tensors_of(whole / end, part))


def test_a_branch_equals_the_run_planned_that_way_from_the_start(trunk):
    """English annealed over five steps from step 6 of 12; its cool-down ends at step 3.48, in the branch too."""
    before = training.numbers_of(trunk), training.checkpoints_of(trunk)
    status = command("anneal", trunk / "english" / "step-00000006", "--tokens", 5 * STEP_TOKENS, "--min", "1e-4")
    branch = trunk.parent / "run-anneal-english-6"
    whole = from_the_start(branch, "planned-english")
    lines = training.lines_of(branch, "train")

    assert status == 0
    assert [line["step"] for line in lines] == list(range(1, 12))
    assert lines[5]["lr"] == 2e-3
    assert [line["lr"] for line in lines[6:]] == pytest.approx([2e-3 * 20 ** (-n / 5) for n in range(1, 6)], rel=1e-12)
    assert_same_result(branch, whole, "english/step-00000011")
    assert (training.numbers_of(trunk), training.checkpoints_of(trunk)) == before


def test_a_branch_does_not_copy_metrics_of_a_removed_stage(trunk):
    """The file begins with steps and losses of an earlier English, whose folder was removed."""
    record = trunk / "metrics.jsonl"
    text = record.read_text()
    stale = {"kind": "validation", "stage": "english", "step": 3, "dataset": "en", "loss_nats_per_token": 99.0}
    step = {"kind": "train", "stage": "english", "step": 3, "loss_nats_per_token": 99.0}
    record.write_text(f"{json.dumps(step)}\n{json.dumps(stale)}\n{text}")
    words = ("--tokens", 5 * STEP_TOKENS, "--job.name", "clean", "--prepare-only")
    status = command("anneal", trunk / "english" / "step-00000006", *words)
    record.write_text(text)
    branch = trunk.parent / "clean"

    assert status == 0
    assert [line["step"] for line in training.lines_of(branch, "train")] == list(range(1, 7))
    assert not any(line["loss_nats_per_token"] == 99.0 for line in training.lines_of(branch, "validation"))


def test_a_branch_from_a_renamed_copy_has_the_original_checkpoint_name(trunk):
    """A run resumes only from checkpoints with their original names."""
    copy = trunk / "english" / "step-00000006-best"
    shutil.copytree(trunk / "english" / "step-00000006", copy)
    status = command("anneal", copy, "--tokens", 5 * STEP_TOKENS, "--job.name", "off-a-copy", "--prepare-only")
    shutil.rmtree(copy)

    assert status == 0
    assert training.checkpoints_of(trunk.parent / "off-a-copy") == ["english/step-00000006"]
    linked = manifest.read(trunk.parent / "off-a-copy" / "english" / "step-00000006")
    assert linked["rope"] == {"rope_base": 500.0, "rope_scaling": None}


def test_a_branch_of_a_later_stage_continues_its_replay_and_optimizer_state(trunk):
    """German from step 4 of a stage without annealing, to beyond its old end; English is not trained again."""
    status = command("anneal", trunk / "german" / "step-00000004", "--tokens", 20 * STEP_TOKENS)
    branch = trunk.parent / "run-anneal-german-4"
    whole = from_the_start(branch, "planned-german")
    seen = {(line["stage"], line["step"]): line["batch_hash"] for line in training.lines_of(trunk, "train")}
    lines = training.lines_of(branch, "train")

    assert status == 0
    assert_same_result(branch, whole, "german/step-00000024")
    assert all(line["batch_hash"] == seen[line["stage"], line["step"]] for line in lines if line["step"] <= 10)
    assert [event["name"] for event in training.events_of(branch)][:2] == ["branch", "start"]
    assert training.events_of(branch, "transition") == []


def test_a_stage_appended_to_a_branch_starts_from_its_pre_anneal_point(trunk):
    """That is the checkpoint from which the branch started."""
    point = trunk / "english" / "step-00000008"

    assert command("anneal", point, "--tokens", 2 * STEP_TOKENS, "--job.name", "early") == 0
    folder = trunk.parent / "early"
    raw = load_config(folder / "config.toml").model_dump(mode="json", by_alias=True, exclude_none=True)
    raw["stages"].append({**training.third_stage(), "optimizer_state": "keep"})

    assert run(training.config_of(raw)) == 0
    transitions = training.events_of(folder, "transition")
    assert [event["weights"] for event in transitions] == [f"from {folder / 'english' / 'step-00000008'}"]
    assert manifest.verify(folder / "english" / "step-00000008")["kind"] == "pre_anneal"


def test_the_same_command_resumes_the_branch_and_another_budget_is_refused(trunk, capsys):
    """Prepared, trained, then skipped; another budget is refused with the difference, before training and after."""
    words = ("anneal", trunk / "english" / "step-00000004", "--tokens", 3 * STEP_TOKENS)
    statuses = [command(*words, "--prepare-only"), command(*words, "--prepare-only")]
    unprepared = command(*words[:-1], 5 * STEP_TOKENS, "--prepare-only")
    assert (unprepared, "stages.english.steps: 7 -> 9" in capsys.readouterr().err) == (2, True)
    branch = trunk.parent / "run-anneal-english-4"
    prepared = training.checkpoints_of(branch)
    statuses += [command(*words), command(*words)]
    capsys.readouterr()
    refused = command(*words[:-1], 4 * STEP_TOKENS)

    assert statuses == [0, 0, 0, 0]
    assert prepared == ["english/step-00000004"]
    assert [line["step"] for line in training.lines_of(branch, "train")] == list(range(1, 8))
    assert refused == 2
    assert "stages.english.steps: 7 -> 8" in capsys.readouterr().err


def test_a_branch_does_not_need_the_old_run(trunk, tmp_path):
    """The files are hard links: the branch's checkpoint is valid after the old one is removed."""
    copy = tmp_path / "run"
    shutil.copytree(trunk, copy)
    config = (copy / "config.toml").read_text().replace(str(trunk.parent), str(tmp_path), 1)
    (copy / "config.toml").write_text(config)
    status = command("anneal", copy / "english" / "step-00000004", "--tokens", "64", "--prepare-only")
    branch = next(tmp_path.glob("run-anneal-*")) / "english" / "step-00000004"
    shard = next(branch.glob("*.safetensors"))
    links = os.stat(shard).st_nlink
    manifest.remove(copy / "english" / "step-00000004")

    assert status == 0
    assert links == 2
    assert manifest.verify(branch)["branched_from"] == str(copy / "english" / "step-00000004")


REFUSED = {
    "english/step-00000002": "constant phase lasts from step 3.48 to step 9",
    "english/step-00000010": "constant phase lasts from step 3.48 to step 9",
}


@pytest.mark.parametrize("point", REFUSED)
def test_a_checkpoint_outside_the_constant_phase_is_refused(trunk, point, capsys):
    """In the cool-down, and in the annealing."""
    status = command("anneal", trunk / point, "--tokens", "1K")

    assert status == 2
    assert REFUSED[point] in capsys.readouterr().err


def test_a_schedule_without_a_constant_phase_is_refused(tmp_path, capsys):
    """A cosine has none."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw["stages"] = [{"name": "english", "dataset": "en", "steps": 2, "lr": {"schedule": "cosine", "max": 1e-3}}]
    run(training.config_of(raw))
    capsys.readouterr()
    status = command("anneal", tmp_path / "run" / "english" / "step-00000002", "--tokens", "1K")

    assert status == 2
    assert "schedule 'cosine' has no constant phase" in capsys.readouterr().err


def test_a_changed_config_of_the_old_run_is_refused(trunk, tmp_path, capsys):
    """The message has the difference from the checkpoint's recipe."""
    copy = tmp_path / "run"
    shutil.copytree(trunk, copy)
    (copy / "config.toml").write_text((copy / "config.toml").read_text().replace("seed = 0", "seed = 5"))
    status = command("anneal", copy / "english" / "step-00000004", "--tokens", "1K")

    assert status == 2
    assert "job.seed: 0 -> 5" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(trunk, tmp_path, capsys):
    """Its files are compared with the manifest before the branch is created."""
    copy = tmp_path / "run"
    shutil.copytree(trunk, copy)
    shard = next((copy / "english" / "step-00000004").glob("*.safetensors"))
    os.truncate(shard, 100)
    status = command("anneal", copy / "english" / "step-00000004", "--tokens", "1K")

    assert status == 2
    assert "has 100 bytes" in capsys.readouterr().err
    assert list(tmp_path.glob("run-anneal-*")) == []


@pytest.mark.parametrize("schedule", ["wsd", "infinite_cosine"])
def test_the_lr_before_the_branch_is_bit_for_bit_the_old_one(tmp_path, schedule):
    """End points between two steps (0.013 and 0.29 of 997) do not move."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    lr = {"schedule": schedule, "max": 3e-3, "warmup_until": 0.013, "min": 1e-4}
    more = {"decay_from": 0.9, "decay": "linear"}
    if schedule != "wsd":
        more = {"constant": 1e-3, "cooldown_until": 0.29, "constant_until": "40K"}
    raw["stages"] = [{"name": "english", "dataset": "en", "steps": 997, "lr": lr | more}]
    config = training.config_of(raw)
    plan = make_plan(config, take_inventory(config))
    checkpoint = tmp_path / "run" / "english" / "step-00000500"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run" / "config.toml").write_text((tmp_path / "run.toml").read_text())
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    recipe = plan.recipe_until(0)
    record = {"stage": "english", "stage_index": 0, "steps_done": 500, "run_step": 500, "kind": "interval"}
    manifest.write(checkpoint, {**record, "recipe": recipe, "fingerprint": "", "data": {}})

    assert command("anneal", checkpoint, "--tokens", "3200", "--prepare-only") == 0
    branch = load_config(tmp_path / "run-anneal-english-500" / "config.toml")
    stage = make_plan(branch, take_inventory(branch)).stages[0]
    assert (stage.steps, stage.pre_anneal_step) == (550, 500)
    assert [stage.lr_at(step) for step in range(500)] == [plan.stages[0].lr_at(step) for step in range(500)]
    assert stage.lr_at(549) == 1e-4
    assert json.loads((tmp_path / "run-anneal-english-500" / "english" / "step-00000500" / "manifest.json").read_text())


def test_a_branch_needs_the_lock_of_its_folder(trunk, capsys):
    """Another process that trains there has it."""
    folder = trunk.parent / "taken"
    pid = os.fork()
    if pid == 0:
        with locked(folder, rank=0):
            (folder / "held").write_text("")
            signal.pause()
        os._exit(0)
    try:
        while not (folder / "held").exists():
            pass
        status = command(
            "anneal", trunk / "english" / "step-00000004", "--tokens", "64", "--job.name", "taken", "--prepare-only"
        )
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)

    assert status == 2
    assert "another process is training here" in capsys.readouterr().err


def test_the_tokens_of_an_annealing_are_counted_in_the_steps_of_a_ramp(tmp_path):
    """Steps of 32 tokens until 192, then of 64: after step 4, 150 tokens are two steps of 32 and two of 64."""
    raw = infinite_twice(tmp_path)
    raw["job"]["name"] = "ramped"
    raw["stages"] = raw["stages"][:1]
    raw["stages"][0]["global_batch_size"] = {"0": 2, "192": 4}
    raw["stages"][0]["lr"] |= {"cooldown_until": 2, "constant_until": 0.75}

    assert run(training.config_of(raw)) == 0
    assert command("anneal", tmp_path / "ramped" / "english" / "step-00000004", "--tokens", "150", "--dry-run") == 0
    assert command("anneal", tmp_path / "ramped" / "english" / "step-00000004", "--tokens", "150") == 0
    branch = tmp_path / "ramped-anneal-english-4"

    assert [line["tokens"] for line in training.lines_of(branch, "train")][-4:] == [160, 192, 256, 320]
    assert training.checkpoints_of(branch)[-1] == "english/step-00000008"
