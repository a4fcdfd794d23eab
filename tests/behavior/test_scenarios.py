"""The schedules of docs/concepts/lr_schedules.md: its TOML is valid, and the LRs are those of the equations."""

import math
import re
from pathlib import Path

import pytest
import training

from titan_cpt.config.load import load_config
from titan_cpt.data.inventory import DataInventory
from titan_cpt.planning.planner import make_plan

pytestmark = training.THEIR_WARNINGS_IGNORED

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "concepts" / "lr_schedules.md").read_text()
WSD, PARMAR, AUTOREGRESSIVE, CONTINUED = re.findall(r"```toml\n(.*?)```", PAGE.partition("## WSD")[2], flags=re.DOTALL)


@pytest.fixture
def stages(head, write):
    """stages(text): the stages and the notes of the plan of that TOML."""

    def stages(text):
        plan = make_plan(load_config(write(head + text)), DataInventory({"pile": 10**8, "german": 10**8}, 257))
        return plan.stages, plan.notes

    return stages


def test_a_stage_after_wsd_starts_before_its_decay(stages):
    """German starts from step 8,000 of 10,000 of the Pile, at its LR of 3e-4; both decay to 0 by 1 - sqrt(x)."""
    (pile, german), notes = stages(WSD)

    assert (german.init.stage, german.init.steps_done) == ("pile", 8000)
    assert (pile.lr_at(7999), german.lr_at(0), german.lr_at(3999)) == pytest.approx((3e-4, 3e-4, 3e-4))
    assert pile.lr_at(8499) == pytest.approx(3e-4 * (1 - math.sqrt(500 / 2000)))
    assert (pile.lr_at(9999), german.lr_at(4999)) == pytest.approx((0, 0), abs=1e-12)
    assert notes == ()


def test_parmars_recipe_begins_at_the_final_lr_of_the_pre_training(stages):
    """From 3e-5 without a warm-up, (3e-5 + 3e-6) / 2 half-way, a hundredth of 3e-4 at the end; the plan has a note."""
    (pile, german), notes = stages(PARMAR)

    assert pile.lr_at(9999) == pytest.approx(3e-5)
    assert german.lr_at(0) == pytest.approx(3e-5, rel=1e-6)
    assert german.lr_at(2499) == pytest.approx(1.65e-5)
    assert german.lr_at(4999) == pytest.approx(3e-6)
    assert [note.partition(", ")[0] for note in notes] == ["stages.german.lr: stays at or below 3e-05"]


def test_autoregressive_peaks_follow_one_cosine(stages):
    """Each stage's peak is the value of the global cosine at its beginning."""
    found, notes = stages(AUTOREGRESSIVE)
    peaks = [max(stage.lr_at(step) for step in range(100)) for stage in found]
    cosine = [3e-5 + 2.7e-4 * (1 + math.cos(math.pi * k / 3)) / 2 for k in range(3)]

    assert peaks == pytest.approx(cosine, rel=1e-6)
    assert notes == ()


def test_a_stage_after_wsd_is_trained_from_before_the_decay(tmp_path):
    """In a training run: the checkpoint before the decay is kept, and the next stage starts from it."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path / "out")
    raw["stages"][0]["lr"] = {"schedule": "wsd", "max": 3e-3, "decay_from": 0.75, "decay": "sqrt", "min": 0.0}
    raw["stages"][1] |= {"init": "stage:english@pre_anneal", "steps": 2, "optimizer_state": "keep"}
    outcome = training.train(training.write_config(raw, tmp_path / "c.toml"))
    run = tmp_path / "out" / "run"
    (begun,) = [event for event in training.events_of(run, "transition") if event["stage"] == "german"]

    assert outcome.status == 0, outcome.output
    assert begun["weights"].endswith("english/step-00000009")
    losses = {
        (line["stage"], line["step"]): line["loss_nats_per_token"] for line in training.lines_of(run, "validation")
    }
    assert losses["german", 0] != losses["english", 12]


def test_data_that_changes_under_one_cosine_changes_at_a_fifth_of_its_peak(stages):
    """3e-5 to 3e-7 over 10,000 steps: 6e-6 at the border of the two stages, and no jump there."""
    (general, best), notes = stages(CONTINUED)
    cosine = [3e-7 + 2.97e-5 * (1 + math.cos(math.pi * t / 10_000)) / 2 for t in (1, 7100, 7101, 10_000)]

    assert (general.lr_at(0), general.lr_at(7099), best.lr_at(0), best.lr_at(2899)) == pytest.approx(cosine, rel=1e-6)
    assert best.lr_at(0) == pytest.approx(3e-5 / 5, rel=0.01)
    assert (best.init.stage, best.init.steps_done, best.keep_optimizer) == ("general", 7100, True)
    assert not [note for note in notes if ".lr" in note]
