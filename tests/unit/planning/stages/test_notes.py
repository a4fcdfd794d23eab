"""Notes on stages that differ from published recipes; a stage that follows them has none."""

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
    """notes(*overrides, german=tokens): the notes of pile -> german, both with LRs of 1e-3 to 1e-4, and 25 % replay."""

    def notes(*overrides, pile=10**6, german=10**6, text=two_stages):
        config = load_config(write(text), overrides)
        return make_plan(config, DataInventory({"pile": pile, "german": german}, 257)).notes

    return notes


def test_the_recommended_recipe_has_no_notes(notes):
    """Re-warmed to the same peak, re-decayed, 25 % replay, less than an epoch."""
    assert notes() == ()


def test_a_jump_of_the_lr_without_warm_up_is_noted(notes):
    """From 1e-4 to 1e-3 in one step; a short warm-up has no note."""
    (note,) = notes(("stages.second.lr.warmup_until", "0"))

    assert note.startswith("stages.second.lr: begins at 0.000999 without a warm-up, after an LR of 0.0001: the loss")
    assert notes(("stages.second.lr.warmup_until", "2")) == ()


def test_a_stage_without_a_warm_up_that_trains_what_was_frozen_before_is_noted(notes):
    """Only the head, then everything at the same LR; with a warm-up, or on the head again, there is no note."""
    first = ("stages.first.trainable", '["head"]')
    cold = ("stages.second.lr", '{ schedule = "cosine", max = 5e-4, warmup_until = 0 }')
    constant = ("stages.first.lr", '{ schedule = "constant", max = 5e-4 }')
    (note,) = notes(first, constant, cold)

    assert note.startswith("stages.second.lr: begins at 0.0005 without a warm-up, and trains weights that first left")
    assert notes(constant, cold) == ()
    assert notes(first, constant, ("stages.second.lr.max", "5e-4")) == ()
    assert notes(first, constant, cold, ("stages.second.trainable", '["head"]')) == ()


def test_new_data_without_replay_is_noted(notes, one_stage):
    """A new dataset; not a stage on the same dataset, nor one with replay."""
    again = (
        one_stage
        + '[[stages]]\nname = "second"\ndataset = "pile"\nsteps = 50\nlr = { schedule = "cosine", max = 1e-3 }\n'
    )
    (note,) = notes(("stages.second.replay.fraction", "0"))

    assert note.startswith("stages.second: german is new to these weights and there is no replay")
    assert "0.25 for a new language" in note
    assert notes(("stages.second.replay.fraction", "0.01")) == ()
    assert notes(text=again) == ()


def test_new_data_without_replay_is_noted_for_pretrained_models_too(notes, head):
    """They forget their data as well."""
    stage = STAGE.format(dataset="german", init="hf:x")
    (note,) = notes(text=head + stage)

    assert note.startswith("stages.next: german is new to these weights")


def test_a_peak_above_that_of_the_pre_training_is_noted(notes):
    """2e-3 after 1e-3; 1.02e-3 counts as the same."""
    (note,) = notes(("stages.second.lr.max", "2e-3"))

    assert note.startswith("stages.second.lr: its peak 0.002 is above 0.001, the highest LR of these weights so far")
    assert notes(("stages.second.lr.max", "1.02e-3")) == ()


def test_staying_at_a_decayed_lr_is_noted_and_at_the_constant_of_an_infinite_schedule_not(notes):
    """Constant at 1e-4, the end of the cosine before."""
    (note,) = notes(("stages.second.lr", '{ schedule = "constant", max = 1e-4 }'))
    infinite = (
        '{ schedule = "infinite_cosine", max = 1e-3, constant = 6e-4, cooldown_until = 0.5, constant_until = 0.8 }'
    )
    later = infinite.replace("max = 1e-3, ", "").replace("0.5", "0, warmup_until = 0")

    assert note.startswith("stages.second.lr: stays at or below 0.0001, the decayed LR of the training before")
    assert notes(("stages.first.lr", infinite), ("stages.second.lr", later)) == ()


def test_replay_of_less_than_a_sequence_counts_as_none(notes):
    """One step has no sequence of a replay of 0.1 %: it is planned, with the note on missing replay."""
    found = notes(("stages.second.steps", "1"), ("stages.second.replay.fraction", "0.001"))

    assert [note for note in found if "there is no replay" in note]
    assert not [note for note in found if " epochs on " in note]


def test_many_epochs_of_new_data_are_noted(notes):
    """50 steps of 15 new sequences x 16 tokens are 12,000; six epochs of 2,001 tokens, three of 4,001."""
    (note,) = notes(german=2001)

    assert note.startswith("stages.second: trains 6.0 epochs on german; beyond 4 epochs")
    assert notes(german=4001) == ()


def test_many_epochs_are_noted_for_the_first_stage_too(notes):
    """100 steps of 20 sequences x 16 tokens are 32,000; eight epochs of 4,001 tokens; nothing is forgotten."""
    (note,) = notes(pile=4001)

    assert note.startswith("stages.first: trains 8.0 epochs on pile; beyond 4 epochs")
    assert "forgotten" not in note
    assert notes(pile=9001) == ()


def test_a_diverging_peak_is_noted(notes):
    """3.0 instead of 3e-4."""
    found = notes(("stages.first.lr.max", "3.0"))

    assert any(note.startswith("stages.first.lr: its peak 3 is far above the usual range of AdamW") for note in found)
    assert not any("far above" in note for note in notes(("stages.first.lr.max", "0.02")))
