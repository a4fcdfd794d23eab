"""Notes on sequences that are longer than any that the weights know."""

import pytest
from plans import stage

from titan_cpt.planning.stages.context_notes import context_notes

YARN = '{ kind = "yarn", factor = 4.0, original_seq_len = 16 }'


def long(name="b", seq_len=64, **more):
    """A stage with sequences of 64 tokens; those of [training] have 16."""
    return stage(name, "pile", 10, seq_len=seq_len, **more)


@pytest.fixture
def notes(head, make):
    """notes(stages, known): the notes of a config with these stages, of weights that know sequences of some length."""

    def notes(stages, known=None):
        plan = make(head + stages)
        found = [note for note in plan.notes if "RoPE" in note or ".rope" in note]
        return found if known is None else list(context_notes(plan.stages, known))

    return notes


def test_a_longer_stage_with_the_rope_of_its_weights_is_noted(notes):
    """With YaRN's keys for these lengths; not if a stage before had as long sequences, nor for new weights."""
    (note,) = notes(stage("a", "pile", 10) + long())

    assert note.startswith("stages.b: trains on sequences of 64 tokens with the RoPE of weights that know 16, so that")
    assert "larger than 10,000 (ABF: arXiv:2309.16039" in note
    assert f"rope = {YARN.replace('4.0', '4')} (arXiv:2309.00071)" in note
    assert notes(long("a") + stage("b", "pile", 10) + long("c")) == []
    assert notes(long("a")) == []


def test_a_stage_that_changes_its_rope_has_no_note(notes):
    """By a base or a scaling; a later stage that is longer again has one."""
    first = stage("a", "pile", 10)

    assert notes(first + long(rope="{ base = 5e5 }")) == []
    assert notes(first + long(rope=YARN)) == []
    assert notes(first + long(rope='{ kind = "linear", factor = 4.0 }') + long("c")) == []
    assert notes(first + long(rope=YARN) + long("c")) == []
    (note,) = notes(first + long(rope=YARN) + long("c", seq_len=128))
    assert "that know 64" in note
    assert "factor = 8, original_seq_len = 16" in note


def test_a_scaling_that_is_too_short_or_for_another_length_is_noted(notes):
    """With the factor that covers the stage."""
    first = stage("a", "pile", 10)
    (short,) = notes(first + long(rope=YARN.replace("4.0", "2.0")))
    (other,) = notes(first + long(rope=YARN.replace("16", "32")))

    assert short.startswith("stages.b.rope: scales to factor x original_seq_len = 32 tokens")
    assert short.endswith("sequences of 64: factor = 4 covers them")
    assert other == (
        "stages.b.rope.original_seq_len: is 32, but the longest sequences that these weights know have 16 tokens"
    )
    assert notes(first + long(rope=YARN) + long("c", seq_len=128, rope=YARN.replace("4.0", "8.0"))) == []


def test_weights_from_outside_are_compared_once_their_length_is_known(notes):
    """A plan without their files has no note on them or on the stages after them."""
    stages = long("a", init='"hf:there"') + long("b", seq_len=128)

    assert notes(stages) == []
    assert notes(stages, {"hf:there": 128}) == []
    assert [note.partition(":")[0] for note in notes(stages, {"hf:there": 64})] == ["stages.b"]
    assert [note.partition(":")[0] for note in notes(stages, {"hf:there": 32})] == ["stages.a", "stages.b"]
