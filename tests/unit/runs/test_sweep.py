"""Sweeps: arms and their names, faults, stages that are trained once, arms that break, are done, or run at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import training

from titan_cpt.cli import main
from titan_cpt.config.sweep import point_names, points, sweep_faults
from titan_cpt.errors import CheckpointError, ConfigError
from titan_cpt.runs import sweep
from titan_cpt.runs.sweep_runs import SweepRun, adopt_shared_stages, read_sweep_runs, shared_stages

pytestmark = training.THEIR_WARNINGS_IGNORED

FRACTION = "stages.german.replay.fraction"


@pytest.fixture
def swept(tmp_path):
    """swept(table, **changes) writes English -> German with that [sweep] and returns the file."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path / "out")

    def swept(table, **changes):
        return training.write_config(training.changed(raw, **changes) | {"sweep": table}, tmp_path / "sweep.toml")

    return swept


def status_of(*words):
    with pytest.raises(SystemExit) as leaving:
        main([str(word) for word in words])
    return leaving.value.code


def begun(run):
    """The stages that were trained in this folder, by their transitions."""
    return [event["stage"] for event in training.events_of(run, "transition")]


# Points and names


def test_keys_are_crossed_and_the_last_one_changes_fastest():
    """Two ratios by two seeds are four arms, however the keys are written."""
    table = {"stages": {"german": {"replay": {"fraction": [0.0, 0.05]}}}, "job.seed": [1, 2]}

    assert points(table) == [
        {FRACTION: 0.0, "job.seed": 1},
        {FRACTION: 0.0, "job.seed": 2},
        {FRACTION: 0.05, "job.seed": 1},
        {FRACTION: 0.05, "job.seed": 2},
    ]
    assert point_names(points(table)) == ["fraction-0_seed-1", "fraction-0_seed-2"] + [
        f"fraction-0.05_seed-{seed}" for seed in (1, 2)
    ]


def test_zipped_keys_go_in_step_and_are_crossed_with_the_rest():
    """Two seeds by two steps of (max, min)."""
    table = {"job.seed": [1, 2], "zip": {"stages.a.lr.max": [1e-3, 2e-3], "stages.a.lr.min": [1e-4, 3e-5]}}
    found = [tuple(point.values()) for point in points(table)]

    assert found == [(1, 1e-3, 1e-4), (1, 2e-3, 3e-5), (2, 1e-3, 1e-4), (2, 2e-3, 3e-5)]
    assert point_names(points(table))[1] == "seed-1_max-0.002_min-3e-5"


def test_names_tell_keys_of_two_stages_and_tables_apart():
    """The shortest end that no other key shares; of tables what differs between them; no two names are the same."""
    same_end = points({"stages.a.lr.max": [1e-3], "stages.b.lr.max": [1e-4, 2e-4]})
    curves = [{"schedule": "constant", "max": 3e-5}, {"schedule": "cosine", "max": 3e-5, "min": 0.0}]
    hidden = points({"job.description": ["a b", "a-b"]})

    assert point_names(same_end)[0] == "a.lr.max-0.001_b.lr.max-0.0001"
    assert point_names(points({"stages.a.lr": curves})) == ["lr-constant", "lr-cosine-0"]
    assert point_names(hidden) == ["description-a-b", "description-a-b_1"]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"seed": [1]}, "sweep.seed: must be a dotted key"),
        ({"job.seed": 1}, "sweep.job.seed: must be a list of values, not empty, got 1"),
        ({"job.seed": []}, "sweep.job.seed: must be a list of values, not empty, got []"),
        ({"job.seed": [1, 1]}, "sweep.job.seed: holds a value twice"),
        ({"job.name": ["a"]}, "sweep.job.name: cannot be swept"),
        ({"zip": {"a.b": [1, 2], "c.d": [1]}}, "sweep.zip: its lists go in step and must be equally long"),
        ({"zip": {"a.b": [1, 1], "c.d": [1, 1]}}, "sweep.zip: two of its steps are the same"),
        ({"zip": [1]}, "sweep.zip: must be a dotted key"),
        ({"job.seed": [1], "job": {"seed": [2]}}, "sweep.job.seed: is given twice"),
    ],
)
def test_a_table_that_is_no_sweep_is_refused(table, expected):
    """With the key, what was found and what is allowed."""
    assert [fault for fault in sweep_faults(table) if fault.startswith(expected)]


def test_a_key_that_leads_nowhere_is_refused_before_anything_is_trained(swept):
    """A stage that is not there, and a key that no arm can have."""
    with pytest.raises(
        ConfigError, match=r"sweep.stages.germn.steps: there is no stage 'germn'; did you mean 'german'"
    ):
        read_sweep_runs([swept({"stages.germn.steps": [1, 2]})])
    with pytest.raises(ConfigError, match=r"stages.german.replay.fractoin: unknown key; did you mean 'fraction'"):
        read_sweep_runs([swept({"stages.german.replay.fractoin": [0.1, 0.2]})])


def test_a_sweep_is_not_trained_as_if_it_were_one_run(swept, capsys):
    """`train` refuses and names the command; `plan` says that it shows the run which the arms differ from."""
    path = swept({FRACTION: [0.0, 0.25]})

    assert status_of("train", "--config", path) == 2
    assert f"describes 2 runs; `titan-cpt sweep {path}` trains them" in capsys.readouterr().err
    assert status_of("plan", "--config", path) == 0
    assert "this file is a sweep" in " ".join(capsys.readouterr().out.split())


# Arms


def test_arms_know_which_stages_they_share(swept):
    """All English where German's replay is swept; none where the seed is."""
    ratios = [arm for arm in read_sweep_runs([swept({FRACTION: [0.0, 0.25]})]) if isinstance(arm, SweepRun)]
    seeds = read_sweep_runs([swept({"job.seed": [0, 1]})])

    assert [shared_stages(arm, ratios) for arm in ratios] == [1, 1]
    assert [shared_stages(arm, seeds) for arm in seeds] == [0, 0]
    assert [str(arm.folder)[-18:] for arm in ratios] == ["out/run/fraction-0", "t/run/fraction-0.25"[-18:]]


def test_arms_measured_on_other_windows_share_nothing(swept):
    """What was measured on the way would not be what the arm would have measured."""
    arms = read_sweep_runs([swept({"validation.sequences": [6, 7]})])

    assert [shared_stages(arm, arms) for arm in arms] == [0, 0]


@pytest.mark.parametrize(
    "key", ["training.local_batch_size", "training.on_loss_spike", "compile.enable", "activation_checkpoint.mode"]
)
def test_arms_that_compute_otherwise_share_nothing(swept, key):
    """A sweep over a key that no recipe holds trains each arm: none is given the other's result as its own."""
    values = {
        "training.local_batch_size": [2, 4],
        "training.on_loss_spike": ["log", "skip"],
        "compile.enable": [False, True],
        "activation_checkpoint.mode": ["none", "full"],
    }
    arms = read_sweep_runs([swept({key: values[key]})])
    readers = read_sweep_runs([swept({"training.num_workers": [0, 1]})])

    assert [shared_stages(arm, arms) for arm in arms] == [0, 0]
    assert [shared_stages(arm, readers) for arm in readers] == [2, 2]  # changes no number


def test_arms_share_the_stages_before_the_first_on_other_data(swept, tmp_path):
    """No recipe holds files: English is shared where German's are swept, nothing where its own are."""
    other = str(training.write_tokens(tmp_path / "other", language=2, tokens=4000, seed=5))
    german = read_sweep_runs([swept({"datasets.de.train": [str(tmp_path / "de"), other]})])
    english = read_sweep_runs([swept({"datasets.en.train": [str(tmp_path / "en"), other]})])

    assert [shared_stages(arm, german) for arm in german] == [1, 1]
    assert [shared_stages(arm, english) for arm in english] == [0, 0]


def test_the_arms_are_listed_with_what_they_come_to(swept, capsys):
    """22 steps of 64 tokens, and the stage that is shared; an arm that cannot be is told with its fault."""
    assert status_of("sweep", swept({FRACTION: [0.0, 0.25, 1.25]}), "--plan") == 0
    shown = capsys.readouterr().out

    assert shown.count("1,408") == 2
    assert shown.count("english") == 2
    assert "cannot be" in shown
    assert "stages.german.replay.fraction: must be in [0, 1), got 1.25" in shown


def test_a_file_without_a_sweep_is_called_a_single_run(swept, capsys):
    """It is trained all the same; a sweep is not said to be one."""
    assert status_of("sweep", swept({}), "--plan") == 0
    assert "has no [sweep], so it is a single run" in capsys.readouterr().out
    assert status_of("sweep", swept({FRACTION: [0.0, 0.25]}), "--plan") == 0
    assert "single run" not in capsys.readouterr().out


def test_one_arm_of_an_array_is_made_ready_for_another_command_to_train(swept, monkeypatch, capsys, tmp_path):
    """SLURM_ARRAY_TASK_ID picks it; a number beyond the last is the user's mistake."""
    path = swept({FRACTION: [0.0, 0.25]})
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")

    assert status_of("sweep", path, "--prepare-only") == 0
    ready = tmp_path / "out" / "run" / "fraction-0.25" / "arm.toml"
    assert f"ready: {ready}" in capsys.readouterr().out
    assert not (tmp_path / "out" / "run" / "fraction-0").exists()
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert status_of("sweep", path) == 2
    assert "--arm: must be from 0 to 1, got 2" in capsys.readouterr().err


def test_a_command_that_is_not_there_breaks_the_arm_with_a_message(swept, capsys):
    """--launch names what cannot be run; exit status 1, as for any arm that failed."""
    assert status_of("sweep", swept({FRACTION: [0.0]}), "--launch", "/nowhere/run.sh") == 1
    assert "--launch: /nowhere/run.sh cannot be run" in " ".join(capsys.readouterr().out.split())


# Trained


def test_a_sweep_trains_what_is_shared_once_and_the_rest_as_if_alone(swept, tmp_path, capsys):
    """Three arms, the second impossible: its fault is told and the third trained; English is trained in the first.

    The third arm's numbers and weights are bit for bit those of the same run trained alone. A second time, nothing is
    trained.
    """
    path = swept({FRACTION: [0.0, 1.25, 0.25]})
    status = status_of("sweep", path)
    shown = capsys.readouterr().out
    first, third = (tmp_path / "out" / "run" / f"fraction-{value}" for value in ("0", "0.25"))
    raw = training.two_stages(tmp_path, tmp_path / "alone")
    alone = training.train(training.write_config(raw, tmp_path / "alone.toml"))
    again = status_of("sweep", path)

    assert (status, alone.status, again) == (1, 0, 1)
    assert (begun(first), begun(third)) == (["english", "german"], ["german"])
    assert "must be in [0, 1), got 1.25" in shown
    assert "adopted english from" in shown
    assert training.numbers_of(third) == training.numbers_of(tmp_path / "alone" / "run")
    last = Path("german") / "step-00000010"
    assert training.same_bits(training.tensors_of(third / last), training.tensors_of(tmp_path / "alone" / "run" / last))
    assert "english/step-00000009" in training.checkpoints_of(third)  # the pre-anneal point
    assert capsys.readouterr().out.count("was trained before") == 2


def test_two_arms_at_once_train_what_they_share_once(swept, tmp_path):
    """As the tasks of an array: the second waits for the first one's English, and adopts it."""
    path = swept({FRACTION: [0.0, 0.25]})
    command = [sys.executable, "-m", "titan_cpt", "sweep", str(path), "--arm"]
    both = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in range(2)]
    said = [process.communicate(timeout=180)[0] for process in both]
    folders = [tmp_path / "out" / "run" / f"fraction-{value}" for value in ("0", "0.25")]

    assert [process.returncode for process in both] == [0, 0]
    assert sorted(map(begun, folders), key=len) == [["german"], ["english", "german"]]
    assert sum("adopted english" in each for each in said) == 1


def test_a_signal_stops_the_arm_under_way_and_begins_no_other(swept, tmp_path):
    """75, everything saved, as a single run; the second arm is not begun."""
    path = swept({"job.seed": [1, 2]}, stages=[training.third_stage() | {"steps": 5000}], datasets={})
    process = subprocess.Popen(
        [sys.executable, "-m", "titan_cpt", "sweep", str(path)], stdout=subprocess.PIPE, text=True
    )
    first = tmp_path / "out" / "run" / "seed-1"
    until = time.monotonic() + 120
    while not training.checkpoints_of(first):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=120)[0]

    assert process.returncode == 75, said
    assert training.events_of(first, "stop")
    assert not (tmp_path / "out" / "run" / "seed-2").exists()


def test_a_signal_ends_the_wait_for_another_arm(swept, tmp_path):
    """An arm that waits while another process has the turn leaves with 75 and has begun nothing."""
    path = swept({FRACTION: [0.0, 0.25]})
    first, second = read_sweep_runs([path])
    command = [sys.executable, "-m", "titan_cpt", "sweep", str(path), "--arm", "1", "--launch", "true"]
    with sweep._Stop() as stop, sweep._turn(first, [first, second], stop, lambda _: None):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
        )
        assert process.stdout is not None
        said = [process.stdout.readline(), process.stdout.readline()]
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)

    assert "waits for the arm that trains the stages they share" in said[1]
    assert process.returncode == 75
    assert not second.folder.exists()


def test_a_run_that_fails_is_told_in_its_own_words(tmp_path):
    """The last error that it named, with the lines that belong to it; its status where it said nothing."""
    console = tmp_path / "console.txt"
    console.write_text("step 1\nConfigError: x.toml: 2 problems\n  - one\n  - two\n")
    said = sweep._last_message(console, 2)
    console.write_text("\n")

    assert said == "ConfigError: x.toml: 2 problems\n  - one\n  - two"
    assert sweep._last_message(console, 9) == "ended with status 9 and said nothing"


def test_a_damaged_checkpoint_is_not_adopted(swept, tmp_path):
    """The arm fails with the file's name rather than begin from other weights."""
    path = swept({FRACTION: [0.0, 0.25]})
    assert training.train(_only_config(path)).status == 0
    first, second = read_sweep_runs([path])
    files = (first.folder / "english" / "step-00000012").rglob("*")
    victim = max((file for file in files if file.is_file()), key=lambda file: file.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)

    with pytest.raises(CheckpointError, match="its content changed since it was saved"):
        adopt_shared_stages(second, [first, second])
    assert not list(second.folder.glob("*/step-00000012/manifest.json"))


def _only_config(path):
    """The config of a sweep's first arm."""
    sweep.train_sweep_runs([path], (), only=0, train=False, say=lambda _: None)
    return read_sweep_runs([path])[0].folder / "arm.toml"


def test_a_sweep_under_torchrun_is_refused(tmp_path, monkeypatch, capsys):
    """Each of its processes would train every run, in the same folders."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(SystemExit) as end:
        main(["sweep", str(tmp_path / "sweep.toml")])

    assert end.value.code == 2
    assert "--launch ./run_train.sh" in capsys.readouterr().err
