"""A disk that fails during a run: the run reports it and continues where that is safe; earlier checkpoints survive."""

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import faulty
import pytest
import training
from permissions import ModesCount

import titan_cpt.checkpoint.storage
import titan_cpt.train
from titan_cpt.checkpoint import manifest
from titan_cpt.config.load import load_config

pytestmark = training.THEIR_WARNINGS_IGNORED


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("unbroken")
    outcome = training.train(training.write_config(training.two_stages(data, folder), folder / "c.toml"))

    assert outcome.status == 0, outcome.output
    return folder / "run"


@pytest.fixture
def config(data, tmp_path):
    """The same run, to be disturbed."""
    return training.write_config(training.two_stages(data, tmp_path), tmp_path / "c.toml")


def assert_same(run, unbroken):
    assert training.numbers_of(run) == training.numbers_of(unbroken)
    for part in ("model", "optimizer"):
        ends = [training.tensors_of(one / "german" / "step-00000010", part) for one in (run, unbroken)]
        assert training.same_bits(*ends)


@dataclass(frozen=True)
class Refusal:
    """`os.<call>` fails with an errno for the files of one checkpoint."""

    call: str
    number: int
    checkpoint: str

    def lay(self):
        """Only in the module that writes the files of checkpoints."""
        sound, refusing = getattr(os, self.call), self

        class Disk:
            """The os module, with one call that fails."""

            def __getattr__(self, name):
                return getattr(os, name) if name != refusing.call else refusing.answer(sound)

        titan_cpt.checkpoint.storage.os = Disk()

    def answer(self, sound):
        """The call."""

        def call(where, *rest):
            path = str(where) if isinstance(where, Path) else os.readlink(f"/proc/self/fd/{where}")
            if self.checkpoint in path:
                raise OSError(self.number, os.strerror(self.number))
            return sound(where, *rest)

        return call


FAULTS = {
    "a disk that is full": ("write", errno.ENOSPC),
    "a disk that turned read-only": ("open", errno.EROFS),
    "a disk that fails at the end": ("fsync", errno.EIO),
    "a quota": ("write", errno.EDQUOT),
}


@pytest.mark.parametrize("mode", ["async", "disabled"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_save_is_reported_and_the_run_ends_with_the_same_numbers(config, unbroken, tmp_path, fault, mode):
    """The interval save of step 4 fails; step 8's is a new attempt. A half-written checkpoint has no manifest."""
    call, number = FAULTS[fault]
    refusal = Refusal(call, number, "english/step-00000004")
    outcome = faulty.train(config, "--checkpoint.async_mode", mode, faults=[refusal])
    run = tmp_path / "run"
    failed = training.events_of(run, "save_failed")
    told = " ".join(outcome.output.split())

    assert outcome.status == 0, outcome.output
    assert f"english/step-00000004: cannot be written: [Errno {number}] {os.strerror(number)}" in told
    assert len(failed) == 1
    assert os.strerror(number) in failed[0]["why"]
    assert not (run / "english" / "step-00000004" / "manifest.json").exists()
    assert_same(run, unbroken)


@pytest.mark.parametrize(("fault", "step", "before"), [*((fault, 12, 9) for fault in FAULTS), ("a quota", 9, 8)])
def test_a_failed_save_that_later_stages_begin_from_ends_the_run(config, unbroken, tmp_path, fault, step, before):
    """The stage's end or the pre-anneal checkpoint: status 2, the last good one is named; the same command resumes."""
    call, number = FAULTS[fault]
    stopped = faulty.train(config, faults=[Refusal(call, number, f"english/step-{step:08d}")])
    run = tmp_path / "run"
    whole = manifest.verify(run / "english" / f"step-{before:08d}")
    there = training.checkpoints_of(run)
    last = training.train(config)

    assert stopped.status == 2, stopped.output
    assert f"step-{before:08d} is the newest complete checkpoint" in " ".join(stopped.output.split())
    assert "Traceback" not in stopped.output
    assert whole["steps_done"] == before
    assert there[-1] == f"english/step-{before:08d}"
    assert last.status == 0, last.output
    assert_same(run, unbroken)


@dataclass(frozen=True)
class Before:
    """Change files right before a step of English, in the run's own process."""

    step: int
    what: str
    path: str

    def lay(self):
        """Take the place of train_step."""
        sound = titan_cpt.train.Trainer.train_step

        def disturbed(trainer, loader, stage, step):
            if stage.name == "english" and step == self.step:
                DEEDS[self.what](Path(self.path))
            return sound(trainer, loader, stage, step)

        titan_cpt.train.Trainer.train_step = disturbed


def replace_in_place(path):
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.write(bytes(reversed(content)))
    os.utime(path, ns=(0, 0))


DEEDS = {
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "replaced": replace_in_place,
    "moved away": lambda path: path.rename(path.with_name("elsewhere")),
    "moved back": lambda path: path.with_name("elsewhere").rename(path),
}


@pytest.mark.parametrize("deed", ["cut short", "replaced"])
def test_data_that_is_changed_under_a_run_is_refused_and_never_read_as_garbage(
    raw_with_own_data, unbroken, tmp_path, deed
):
    """Before step 6: exit status 2 and the name of the file. With the data restored, a resume gives equal numbers."""
    config = training.write_config(raw_with_own_data, tmp_path / "c.toml")
    content = (tmp_path / "en.bin").read_bytes()
    stopped = faulty.train(config, faults=[Before(6, deed, str(tmp_path / "en.bin"))])
    steps = [line["step"] for line in training.lines_of(tmp_path / "run", "train")]
    (tmp_path / "en.bin").write_bytes(content)
    last = training.train(config)

    assert stopped.status == 2, stopped.output
    assert f"{tmp_path / 'en.bin'}: " in stopped.output
    assert "checkpoints are intact" in stopped.output
    assert "Traceback" not in stopped.output
    assert max(steps) <= 6
    assert last.status == 0, last.output
    assert_same(tmp_path / "run", unbroken)


@pytest.fixture
def raw_with_own_data(data, tmp_path):
    """The run on a copy of the data."""
    for path in data.glob("*.*"):
        shutil.copy(path, tmp_path)
    return training.two_stages(tmp_path, tmp_path)


def test_a_folder_that_vanishes_for_a_while_costs_one_save_and_nothing_else(config, unbroken, tmp_path):
    """Gone at step 2, back at step 6: the run reports the failed save of step 4 and makes no empty folder."""
    run = tmp_path / "run"
    faults = [Before(2, "moved away", str(run)), Before(6, "moved back", str(run))]
    outcome = faulty.train(config, faults=faults)

    assert outcome.status == 0, outcome.output
    assert "english/step-00000004: cannot be written: " in " ".join(outcome.output.split())
    assert_same(run, unbroken)


def test_a_folder_that_vanishes_for_good_ends_the_run_at_the_next_checkpoint_that_it_needs(config, tmp_path):
    """The pre-anneal checkpoint after step 9 cannot be saved: status 2; the moved folder holds the earlier one."""
    outcome = faulty.train(config, faults=[Before(6, "moved away", str(tmp_path / "run"))])

    assert outcome.status == 2, outcome.output
    assert "Traceback" not in outcome.output
    assert not (tmp_path / "run").exists()
    assert training.checkpoints_of(tmp_path / "elsewhere") == ["english/step-00000004"]
    assert manifest.verify(tmp_path / "elsewhere" / "english" / "step-00000004")["steps_done"] == 4


class SlowDisk:
    """Every file of a checkpoint takes a fifth of a second; what counts as slow is a hundredth."""

    def lay(self):
        """Once, in this process."""
        import time

        sound = titan_cpt.checkpoint.storage.ShardWriter._write_file

        def slowly(self, *rest):
            time.sleep(0.2)
            return sound(self, *rest)

        titan_cpt.checkpoint.storage.ShardWriter._write_file = slowly
        titan_cpt.training.saving.SLOW_SAVE_S = 0.01


def test_the_run_waits_for_a_slow_disk_says_so_and_changes_no_number(config, unbroken, tmp_path):
    """Saves follow each other faster than they are written: one at a time, none skipped."""
    outcome = faulty.train(config, "--checkpoint.interval", "2", faults=[SlowDisk()])

    assert outcome.status == 0, outcome.output
    assert "for the previous checkpoint to be written" in " ".join(outcome.output.split())
    assert_same(tmp_path / "run", unbroken)


DETERMINISTIC = ("--job.deterministic", "true")


@pytest.mark.parametrize(
    ("key", "told"),
    [("world_size", "2 -> 1"), ("torch", "1.0 -> "), ("threads", "7 -> 1"), ("processor", "H100 -> ")],
)
def test_deterministic_refuses_a_resume_whose_bits_it_could_not_keep(config, tmp_path, key, told):
    """Other ranks, torch, threads or processor: the error names the difference and the flag that resumes anyway."""
    checkpoint = tmp_path / "run" / "english" / "step-00000004"
    killed = faulty.train(
        config, *DETERMINISTIC, faults=[training.Fault("titan_cpt.train:Trainer.train_step", 7, checkpoint)]
    )
    path = checkpoint / "manifest.json"
    record = training.json.loads(path.read_text())
    before = {"world_size": 2, "torch": "1.0", "threads": 7, "processor": "H100"}[key]
    path.write_text(training.json.dumps({**record, key: before}))
    refused = training.train(config, *DETERMINISTIC)
    allowed = training.train(config)

    assert killed.status == -9
    assert refused.status == 2
    assert "job.deterministic cannot be kept" in refused.output
    assert f"{key}: {told}" in refused.output
    assert "--job.deterministic false" in refused.output
    assert allowed.status == 0, allowed.output


def test_deterministic_runs_give_the_bits_of_ordinary_ones_and_a_resume_keeps_them(config, unbroken, tmp_path):
    """On a CPU all our kernels are deterministic: the option only adds refusals."""
    checkpoint = tmp_path / "run" / "english" / "step-00000004"
    killed = faulty.train(
        config, *DETERMINISTIC, faults=[training.Fault("titan_cpt.train:Trainer.train_step", 7, checkpoint)]
    )
    last = training.train(config, *DETERMINISTIC)

    assert killed.status == -9
    assert last.status == 0, last.output
    assert_same(tmp_path / "run", unbroken)


@pytest.mark.parametrize(("chosen", "expected"), [(None, ":4096:8"), (":16:8", ":16:8")])
def test_deterministic_gives_cublas_its_workspace_before_cuda_begins(monkeypatch, config, chosen, expected):
    """Without it torch stops at the first matrix product on CUDA; a value that the user chose stays."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", chosen or "")
    if chosen is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")

    def join(*_):
        raise InterruptedError(os.environ["CUBLAS_WORKSPACE_CONFIG"])

    monkeypatch.setattr("titan_cpt.common.process_settings.keep_freed_memory", lambda: True)
    monkeypatch.setattr("titan_cpt.train.init_process_group", join)
    with pytest.raises(InterruptedError, match=f"^{expected}$"):
        titan_cpt.train.run(load_config(config, [("job.deterministic", "true")]))


@pytest.mark.parametrize(
    "what", ["german/step-00000010/manifest.json", "german/step-00000010/rank-00000-0.safetensors", "german"]
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_without_read_permission_is_not_damaged_and_nothing_is_trained_again(
    config, unbroken, tmp_path, what, ranks
):
    """Such files once counted as damaged or absent: the run resumed from an older checkpoint and replaced this one."""
    shutil.copytree(unbroken, tmp_path / "run")
    content = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("step-*/*")}
    mode = (tmp_path / "run" / what).stat().st_mode
    (tmp_path / "run" / what).chmod(0)
    refused = faulty.launch(config, faults=[ModesCount()], ranks=ranks)
    (tmp_path / "run" / what).chmod(mode)
    last = training.train(config)

    assert [outcome.status for outcome in refused] == [2] * ranks, refused[0].output
    told = f"AccessError: {tmp_path / 'run' / what}: cannot be read: Permission denied"
    assert [told in outcome.output for outcome in refused] == [True, False][:ranks]  # once
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("step-*/*")} == content
    assert last.status == 0, last.output
    assert len(training.lines_of(tmp_path / "run", "train")) == 22
