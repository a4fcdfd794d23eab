"""Departures from the recipe are told with the reason and never refused; the recipe itself is met with silence."""

import pytest

from titan_cpt.config.load import load_config
from titan_cpt.data.inventory import DataInventory
from titan_cpt.planning.planner import make_plan

STAGE = """
[[stages]]
name = "next"
dataset = "{dataset}"
steps = 50
init = "{init}"
lr = {{ schedule = "cosine", max = 1e-3 }}
"""


@pytest.fixture
def notes(two_stages, write):
    """notes(*overrides, german=tokens): what the plan of pile -> german says; first LR 1e-3 to 1e-4, 25 % replay."""

    def notes(*overrides, pile=10**6, german=10**6, text=two_stages):
        config = load_config(write(text), overrides)
        return make_plan(config, DataInventory({"pile": pile, "german": german}, 257)).notes

    return notes


def test_the_recipe_is_met_with_silence(notes):
    """Re-warmed to the same peak, re-decayed, 25 % replay, under an epoch."""
    assert notes() == ()


def test_a_jump_without_warm_up_from_a_decayed_checkpoint_is_told(notes):
    """From 1e-4 to 1e-3 in one step; with a warm-up of a single step nothing is said."""
    (note,) = notes(("stages.second.lr.warmup_until", "0"))

    assert note.startswith("stages.second.lr: begins at 0.000999 without a warm-up, after an LR of 0.0001: the loss")
    assert notes(("stages.second.lr.warmup_until", "2")) == ()


def test_new_data_without_replay_is_told(notes, one_stage):
    """Under a new dataset; not where the stage goes on with the same one, nor with any replay at all."""
    again = (
        one_stage
        + '[[stages]]\nname = "second"\ndataset = "pile"\nsteps = 50\nlr = { schedule = "cosine", max = 1e-3 }\n'
    )
    (note,) = notes(("stages.second.replay.fraction", "0"))

    assert note.startswith("stages.second: german is new to these weights and there is no replay")
    assert "0.25 for a new language" in note
    assert notes(("stages.second.replay.fraction", "0.01")) == ()
    assert notes(text=again) == ()


def test_new_data_without_replay_is_told_of_released_weights_too(notes, head):
    """What a model from elsewhere knows is forgotten just the same."""
    stage = STAGE.format(dataset="german", init="hf:x")
    (note,) = notes(text=head + stage)

    assert note.startswith("stages.next: german is new to these weights")


def test_a_peak_above_the_pre_training_one_is_told(notes):
    """2e-3 after 1e-3, with both; not 1.02e-3, which is the same for all anybody knows."""
    (note,) = notes(("stages.second.lr.max", "2e-3"))

    assert note.startswith("stages.second.lr: its peak 0.002 is above 0.001, the highest LR of these weights so far")
    assert notes(("stages.second.lr.max", "1.02e-3")) == ()


def test_staying_at_a_decayed_lr_is_told_and_staying_at_a_constant_one_is_not(notes):
    """Constant at 1e-4 after a cosine down to it; going on at an infinite schedule's constant LR is right."""
    (note,) = notes(("stages.second.lr", '{ schedule = "constant", max = 1e-4 }'))
    infinite = (
        '{ schedule = "infinite_cosine", max = 1e-3, constant = 6e-4, cooldown_until = 0.5, constant_until = 0.8 }'
    )
    later = infinite.replace("max = 1e-3, ", "").replace("0.5", "0, warmup_until = 0")

    assert note.startswith("stages.second.lr: stays at or below 0.0001, the decayed LR of the stage before")
    assert notes(("stages.first.lr", infinite), ("stages.second.lr", later)) == ()


def test_a_stage_too_short_for_a_share_of_its_data_is_planned(notes):
    """One step of a few sequences holds none of a replay of 0.1 %: nothing to divide by, and told as no replay."""
    told = notes(("stages.second.steps", "1"), ("stages.second.replay.fraction", "0.001"))

    assert [note for note in told if "there is no replay" in note]
    assert not [note for note in told if " epochs on " in note]


def test_many_epochs_over_the_new_data_are_told(notes):
    """50 steps of 15 new sequences x 16 tokens are 12,000; over 2,001 tokens six times, over 4,001 three times."""
    (note,) = notes(german=2001)

    assert note.startswith("stages.second: trains 6.0 epochs on german; beyond 4 epochs")
    assert notes(german=4001) == ()


def test_many_epochs_are_told_of_the_first_stage_too(notes):
    """100 steps of 20 sequences x 16 tokens are 32,000; over 4,001 tokens eight times; nothing is forgotten yet."""
    (note,) = notes(pile=4001)

    assert note.startswith("stages.first: trains 8.0 epochs on pile; beyond 4 epochs")
    assert "forgotten" not in note
    assert notes(pile=9001) == ()


def test_a_peak_that_cannot_work_is_told(notes):
    """3.0 for 3e-4: a slip of the exponent."""
    told = notes(("stages.first.lr.max", "3.0"))

    assert any(note.startswith("stages.first.lr: its peak 3 is far above the usual range of AdamW") for note in told)
    assert not any("far above" in note for note in notes(("stages.first.lr.max", "0.02")))
