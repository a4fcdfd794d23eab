"""Notes on stages that train a release, compared with its own training; the facts here are made up."""

import pytest
from plans import stage

from titan_cpt.models.releases import Fact, Release, ReleaseStage
from titan_cpt.planning.stages.release_notes import ReleasedWeights, release_notes

INIT = '"hf:made/up"'
COLD = 'schedule = "cosine", max = 1e-3, min = 1e-4, warmup_until = 0'
WARM = 'schedule = "cosine", max = 1e-3, min = 1e-4, warmup_until = 0.2'


def cited(facts, source):
    return {name: Fact(value=value, source=source) for name, value in facts.items() if value is not None}


def release(left_at=5e-4, **more):
    """100K tokens at 1e-3, then an annealing from 5e-4 to 0 in sequences of 32 tokens."""
    first = {"tokens": 100_000, "peak_lr": 1e-3, "final_lr": left_at, "seq_len": 16, "end": "stage1"}
    last = {"tokens": 10_000, "peak_lr": 5e-4, "final_lr": 0.0, "seq_len": 32}
    stages = (
        ReleaseStage(name="first", **cited(first, "paper")),
        ReleaseStage(name="annealing", **cited(last, "config")),
    )
    facts = {"before_anneal": "made/up@stage1", "tokenizer": "words", "tokenizer_size": 300, **more}
    known = {name: Fact(value=value, source="page") for name, value in facts.items() if value is not None}
    return Release(family="gpt_neox", size="410m", hub=("made/up",), stages=stages, **known)


@pytest.fixture
def notes(head, make):
    """notes(lr, ...): the notes of a stage of 10 steps of 20 x 16 tokens that starts from the made-up release."""

    def notes(lr=WARM, revision="main", known=True, token_ids=300, **more):
        plan = make(head + stage("a", "pile", 10, lr=lr, init=INIT))
        found = ReleasedWeights("made/up", release(**more) if known else None, revision)
        return list(release_notes(plan.stages, {"hf:made/up": found}, token_ids))

    return notes


def of_key(notes, key):
    """The notes on a key of stage a."""
    return [note for note in notes if note.startswith(f"stages.a{key}:")]


def test_the_first_note_says_how_the_weights_were_trained_and_what_the_stage_adds(notes):
    """Tokens and the LR at the revision, with the sources of both LRs; 3,200 tokens are 2.9 % of 110,000."""
    assert notes()[0] == (
        "stages.a.init: made/up was trained on 110K tokens at a peak LR of 0.001 and left at 0 (paper; config). This "
        "stage adds 3.2K (2.9 % of these) at a peak of 0.001"
    )
    assert notes(revision="stage1")[0].startswith(
        "stages.a.init: made/up was trained on 100K tokens at a peak LR of 0.001 and left at 0.0005 (paper). This"
    )


def test_what_is_not_known_is_not_compared(notes):
    """Of an unknown model one line; of an unknown revision the peak, but not the LR at which it was left."""
    (unknown,) = notes(COLD, known=False)
    odd = notes(COLD, revision="odd")
    folder = notes(COLD, revision=None)

    assert unknown.startswith("stages.a.init: nothing is known of the training of made/up, such as the LR at which")
    assert "at which LR it was left is not known (paper). This stage adds 3.2K at a peak" in odd[0]
    assert "which revision these weights are of is not known, so neither is the LR" in folder[0]
    assert [note for note in odd + folder if "without a warm-up" in note] == []


def test_a_start_far_above_the_lr_of_the_release_without_a_warm_up_is_noted(notes):
    """As between the stages of a run; not with a warm-up, nor from a checkpoint of about the same LR."""
    (note,) = of_key(notes(COLD), ".lr")

    assert note.startswith("stages.a.lr: begins at 0.000978 without a warm-up, after an LR of 0: the loss will spike")
    assert of_key(notes(WARM), ".lr") == []
    assert of_key(notes(COLD, revision="stage1"), ".lr") == []


def test_a_peak_above_that_of_the_release_is_noted(notes):
    """2e-3 after 1e-3, also if the revision is unknown."""
    for revision in ("main", None):
        (note,) = of_key(notes(WARM.replace("max = 1e-3", "max = 2e-3"), revision=revision), ".lr")
        assert note.startswith("stages.a.lr: its peak 0.002 is above 0.001, the highest LR of these weights so far")


def test_a_checkpoint_before_the_annealing_is_named_where_the_lr_rises_again(notes):
    """For a re-warming or a schedule without an end; not if the stage starts there, nor if none is known."""

    def named(lr=WARM, **more):
        return [note for note in of_key(notes(lr, **more), ".init") if "before the annealing" in note]

    endless = 'schedule = "constant", max = 1e-3'
    (note,) = named()
    assert note.startswith(
        "stages.a.init: the last public checkpoint before the annealing is hf:made/up@stage1, left at 0.0005 (page);"
    )
    assert len(named(endless)) == 1
    assert named(revision="stage1") == named(endless, revision="stage1", left_at=None) == []
    assert named(revision=None) == []
    assert named(before_anneal=None) == []


def test_shorter_sequences_are_noted(notes):
    """16 after 32; after 16 there is none."""
    (note,) = of_key(notes(), "")

    assert note.startswith("stages.a: trains on sequences of 16 tokens, and these weights were last trained on 32:")
    assert of_key(notes(revision="stage1"), "") == []


def test_another_number_of_ids_is_noted(notes):
    """257 of the run's tokenizer, 300 of the release's; not if either is unknown."""

    def other(**more):
        return [note for note in notes(**more) if "tokenizer" in note]

    (note,) = other(token_ids=257)
    assert note == (
        "stages.a.init: the tokenizer of made/up (words) has 300 ids (page), and tokenizer.path has 257: with another "
        "tokenizer the same ids mean other tokens"
    )
    assert other() == other(token_ids=None) == other(token_ids=257, tokenizer_size=None) == []
