"""comm.init_timeout_seconds until every rank has taken its first step, comm.train_timeout_seconds from then on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import faulty
import pytest
import training

import titan_cpt.train

pytestmark = training.THEIR_WARNINGS_IGNORED


@dataclass(frozen=True)
class Late:
    """Rank 1 begins a step of the first stage `seconds` seconds after rank 0."""

    step: int
    seconds: float

    def lay(self) -> None:
        """Take the place of train_step in this process."""
        sound = titan_cpt.train.Trainer.train_step

        def late(trainer: Any, loader: Any, stage: Any, step: int) -> Any:
            if trainer.process.rank == 1 and step == self.step and stage.name == "english":
                time.sleep(self.seconds)
            return sound(trainer, loader, stage, step)

        titan_cpt.train.Trainer.train_step = late


@pytest.fixture
def config(tmp_path):
    """One stage on two ranks."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw = training.changed(raw, comm={"init_timeout_seconds": 60, "train_timeout_seconds": 2})
    raw["stages"] = raw["stages"][:1]
    return training.write_config(training.changed(raw, training={"local_batch_size": 1}), tmp_path / "c.toml")


def test_the_first_step_may_take_longer_than_a_later_one(config, tmp_path):
    """4 s late for the first step, as for compiling, is within init_timeout_seconds; for the fourth it is too late."""
    slow_start = faulty.train(config, ranks=2, faults=[Late(0, 4)])
    stalled = faulty.train(config, "--job.name", "stalled", ranks=2, faults=[Late(3, 4)])

    assert slow_start.status == 0, slow_start.output
    assert stalled.status == 1, stalled.output
    assert len(training.lines_of(tmp_path / "stalled", "train")) <= 4


def test_a_first_step_has_its_own_limit(config):
    """3 s late for the first step, with init_timeout_seconds = 1: it is not train_timeout_seconds that counts there."""
    limits = ("--comm.init_timeout_seconds", "1", "--comm.train_timeout_seconds", "60")
    stalled = faulty.train(config, *limits, ranks=2, faults=[Late(0, 3)])

    assert stalled.status == 1, stalled.output
