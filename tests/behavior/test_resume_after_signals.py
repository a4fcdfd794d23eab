"""Signals and killed ranks: a run saves within a step, also during validation, and torchrun restarts killed ranks."""

import json
import os
import signal
import subprocess
import sys

import faulty
import pytest
import training
from training import Process, train

from titan_cpt.checkpoint import manifest
from titan_cpt.config.toml_files import parse_toml

pytestmark = training.THEIR_WARNINGS_IGNORED


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("unbroken")
    outcome = train(training.write_config(training.two_stages(data, folder), folder / "c.toml"))

    assert outcome.status == 0, outcome.output
    return folder / "run"


@pytest.fixture
def config(data, tmp_path):
    """The same run, to be disturbed."""
    return training.write_config(training.two_stages(data, tmp_path), tmp_path / "c.toml")


class Signalled:
    """Send this process a signal when `place` is called for the `call`-th time."""

    def __init__(self, place, call, number):
        self.place, self.call, self.number = place, call, number

    def lay(self):
        """Replace the function at `place`."""
        module, _, name = self.place.partition(":")
        holder = sys.modules[module]
        *path, name = name.split(".")
        for part in path:
            holder = getattr(holder, part)
        original, calls = getattr(holder, name), [0]

        def signalling(*args, **kwargs):
            calls[0] += 1
            if calls[0] == self.call:
                os.kill(os.getpid(), self.number)
            return original(*args, **kwargs)

        setattr(holder, name, signalling)


def assert_same(run, unbroken):
    assert training.numbers_of(run) == training.numbers_of(unbroken)
    assert training.checkpoints_of(run) == training.checkpoints_of(unbroken)
    for part in ("model", "optimizer"):
        ends = [training.tensors_of(one / "german" / "step-00000010", part) for one in (run, unbroken)]
        assert training.same_bits(*ends)


def test_slurms_signal_before_the_time_limit_saves_and_exits_with_75(config, unbroken, tmp_path):
    """SIGUSR1, from outside."""
    process = Process(config)
    process.wait_for(lambda: len(training.lines_of(tmp_path / "run", "train")) >= 2)
    process.send(signal.SIGUSR1)
    stopped = process.end()
    last = train(config)

    assert stopped.status == 75, stopped.output
    assert "stopped by SIGUSR1; everything is saved" in stopped.output
    assert last.status == 0, last.output
    assert_same(tmp_path / "run", unbroken)


def test_a_signal_while_data_is_prepared_stops_the_run_at_once_and_keeps_the_parts(config, tmp_path):
    """Signals were once handled only between steps: during hours of preparation Slurm killed the run without a 75."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"text {number} " * 9}) + "\n" for number in range(300)))
    raw = parse_toml(config.read_text())
    language = list(raw["datasets"])[1]
    table = {**raw["datasets"][language], "train": str(tmp_path / "prepared"), "source": {"text": str(text)}}
    training.write_config(training.changed(raw, datasets={**raw["datasets"], language: table}), config)
    stopped = faulty.train(config, faults=[Signalled("titan_cpt.data.prepare.prepare:_publish", 1, signal.SIGTERM)])
    kept = sorted(path.suffix for path in (tmp_path / "prepared.partial").glob("[0-9a-f]*"))
    last = train(config)

    assert stopped.status == 75, stopped.output
    assert "stopped by SIGTERM before training" in stopped.output
    assert "finished parts are kept in" in stopped.output
    assert kept == [".bin", ".idx", ".json"]
    assert "1 of 1 parts were finished by an earlier run" in last.output
    assert last.status == 0, last.output


MEASUREMENTS = {
    1: ("before any step", 0, []),  # English at step 0; nothing was trained, so there is nothing to save
    3: ("in the middle of English", 5, ["english/step-00000005"]),
    7: ("at English's end", 12, ["english/step-00000012"]),
    9: ("before German's first step", 12, ["english/step-00000012"]),
    13: ("at German's end", 22, ["german/step-00000010"]),
}


@pytest.mark.parametrize("call", MEASUREMENTS)
def test_a_signal_stops_a_validation_and_the_resume_repeats_it(config, unbroken, tmp_path, call):
    """It comes during the first dataset's validation: the second does not begin, and the state is saved. The same
    command then validates first, so that no number is missing or different in the end."""
    _, steps, saved = MEASUREMENTS[call]
    stopped = faulty.train(
        config, faults=[Signalled("titan_cpt.training.validation:Validator._loss", call, signal.SIGTERM)]
    )
    run = tmp_path / "run"
    before = len(training.lines_of(run, "train")), len(training.lines_of(run, "validation"))
    there = [name for name in saved if name in training.checkpoints_of(run)]
    last = train(config)

    assert stopped.status == 75, stopped.output
    assert before == (steps, call - 1)
    assert there == saved
    assert last.status == 0, last.output
    assert training.numbers_of(run) == training.numbers_of(unbroken)
    assert len(training.lines_of(run, "train")) == 22


def test_a_validation_stopped_in_its_repetition_is_repeated_once_more(config, unbroken, tmp_path):
    """Stopped twice in a row at the same place; the third process completes it."""
    place = "titan_cpt.training.validation:Validator._loss"
    first = faulty.train(config, faults=[Signalled(place, 3, signal.SIGTERM)])
    again = faulty.train(config, faults=[Signalled(place, 1, signal.SIGINT)])
    owed = manifest.read(tmp_path / "run" / "english" / "step-00000005")["validation_due"]
    last = train(config)

    assert (first.status, again.status, last.status) == (75, 75, 0), last.output
    assert owed
    assert training.numbers_of(tmp_path / "run") == training.numbers_of(unbroken)


def test_a_second_sigint_exits_at_once_and_damages_nothing(config, unbroken, tmp_path):
    """While the save that the first one requested is being written."""
    faults = [
        Signalled("titan_cpt.train:Trainer.train_step", 6, signal.SIGINT),
        Signalled("titan_cpt.checkpoint.manifest:write", 2, signal.SIGINT),
    ]
    left = faulty.train(config, faults=faults)
    last = train(config)

    assert left.status == -signal.SIGINT
    assert last.status == 0, last.output
    assert_same(tmp_path / "run", unbroken)


RANK_1_DIES_ONCE = """
import os, signal, sys
import titan_cpt.train
from titan_cpt.cli import main

sound, marker = titan_cpt.train.Trainer.train_step, sys.argv.pop()


def deadly(trainer, loader, stage, step):
    if trainer.process.rank == 1 and stage.name == "english" and step == 6 and not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return sound(trainer, loader, stage, step)


titan_cpt.train.Trainer.train_step = deadly
main()
"""


def lives_with_a_killed_rank(raw, tmp_path, *, nodes):
    """Two ranks under `torchrun --max-restarts 1`, of one node or of two; rank 1 is killed once, at step 6."""
    config = training.write_config(raw, tmp_path / "c.toml")
    script = tmp_path / "deadly.py"
    script.write_text(RANK_1_DIES_ONCE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "1", "--nnodes", str(nodes)]
    torchrun += ["--nproc-per-node", str(2 // nodes), "--rdzv-backend", "c10d", "--rdzv-id", "x"]
    torchrun += ["--rdzv-endpoint", f"127.0.0.1:{faulty.free_port()}", "--local-addr", "127.0.0.1"]
    command = [*torchrun, script, "train", "--config", config, tmp_path / "marker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    if nodes > 1:
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # as run_train.sh does
    output = tmp_path / "output.txt"
    with output.open("a") as told:
        started = [
            subprocess.Popen(command, env=environment, stdout=told, stderr=subprocess.STDOUT) for _ in range(nodes)
        ]
        try:
            statuses = [process.wait(timeout=240) for process in started]
        finally:
            for process in started:
                process.kill()
    return statuses, output.read_text()


@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_restarts_the_ranks_when_one_is_killed(data, tmp_path, nodes):
    """One of two ranks is killed at step 6: the run resumes from step 4 and gives the numbers of an unbroken one."""
    raw = training.changed(training.two_stages(data, tmp_path), training={"local_batch_size": 1})
    raw["stages"] = raw["stages"][:1]
    whole = training.write_config(training.changed(raw, job={"name": "whole"}), tmp_path / "whole.toml")
    unbroken = faulty.train(whole, ranks=2)
    statuses, output = lives_with_a_killed_rank(raw, tmp_path, nodes=nodes)
    run = tmp_path / "run"

    assert unbroken.status == 0, unbroken.output
    assert statuses == [0] * nodes, output
    assert (tmp_path / "marker").exists()
    assert [event["step"] for event in training.events_of(run, "resume")] == [4]
    assert training.numbers_of(run) == training.numbers_of(tmp_path / "whole")
