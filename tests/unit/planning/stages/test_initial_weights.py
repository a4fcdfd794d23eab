"""Where a stage's weights come from: previous, stage:NAME, pre-anneal points, and the history of branches."""

from fractions import Fraction

import pytest
from plans import COSINE, INFINITE, datasets, ordinals, stage

from titan_cpt.data.trained_text import Leg
from titan_cpt.errors import PlanError
from titan_cpt.planning.plan import StageCheckpoint


@pytest.mark.parametrize(
    ("lr", "init", "steps_done"),
    [
        (COSINE, None, 100),
        (COSINE, "stage:a", 100),
        (INFINITE, None, 85),
        (INFINITE, "previous", 85),
        (INFINITE, "stage:a", 100),
        (INFINITE, "stage:a@pre_anneal", 85),
        (INFINITE.replace("0.85", "1.0"), None, 100),
        (INFINITE.replace("0.85", "0.857"), None, 85),
        (INFINITE.replace("0.85", "90"), None, 90),
        (INFINITE.replace("0.85", '"22_400"'), None, 70),
        ('schedule = "wsd", max = 1e-3, decay_from = 0.8, decay = "sqrt"', None, 100),
        ('schedule = "wsd", max = 1e-3, decay_from = 0.8, decay = "sqrt"', "stage:a@pre_anneal", 80),
    ],
)
def test_a_stage_starts_from_the_configured_checkpoint(head, make, lr, init, steps_done):
    """After an infinite stage "previous" is its pre-anneal point; data of the annealing does not count."""
    more = {} if init is None else {"init": f'"{init}"'}
    plan = make(head + stage("a", "pile", 100, lr) + stage("b", "pile", 10, **more))
    second = plan.stage("b")

    assert second.init == StageCheckpoint("a", steps_done)
    assert second.history.steps == steps_done
    assert second.history.trained == {"pile": (Leg(16, 0, 20 * steps_done),)}
    assert second.history.exposure == {"pile": 20 * steps_done}
    assert plan.batch(second, 0)[0].ordinal == 20 * steps_done


def test_an_average_is_that_of_the_end_or_of_the_pre_anneal_point(head, make):
    """The stages before count as trained up to there; the end of an annealed stage gets a note with the other one."""
    averaging = {"averaging": '{ kind = "mean" }'}
    plans = {
        init: make(head + stage("a", "pile", 100, INFINITE, **averaging) + stage("b", "pile", 10, init=f'"{init}"'))
        for init in ("stage:a@average", "stage:a@pre_anneal@average")
    }
    end, point = (plan.stage("b") for plan in plans.values())
    notes = [[note for note in plan.notes if "average" in note] for plan in plans.values()]

    assert (end.init, point.init) == (StageCheckpoint("a", 100, average=True), StageCheckpoint("a", 85, average=True))
    assert (end.recipe["init"], point.recipe["init"]) == ("a@100@average", "a@85@average")
    assert point.history.steps == 85
    assert notes == [
        [
            "stages.b.init: stage:a@average is of the annealed end of 'a'; its average at the pre-anneal point, which "
            "imitates an annealing instead, is stage:a@pre_anneal@average"
        ],
        [],
    ]


def test_two_stages_from_the_same_checkpoint_have_separate_histories(head, make):
    """Both continue from it; the second has not seen the first one's data."""
    five = {"replay": "{ fraction = 0.05 }"}
    plan = make(
        head
        + datasets("books")
        + stage("a", "pile", 100)
        + stage("b", "german", 100, **five)
        + stage("c", "books", 100, init='"stage:a"', **five)
        + stage("d", "pile", 10, init='"random"')
    )

    assert dict(plan.stage("c").shares) == {"books": Fraction(19, 20), "pile": Fraction(1, 20)}
    assert ordinals(plan, "c", "pile", replayed=True) == list(range(100))
    assert plan.stage("d").history.steps == 0
    assert ordinals(plan, "d", "pile", replayed=False) == list(range(200))


def test_a_schedule_without_annealing_has_no_pre_anneal_point(two_stages, make):
    """A cosine."""
    with pytest.raises(
        PlanError,
        match=r"stages\.second\.init: stage 'first' has no annealing, so no pre-anneal point: write stage:first for",
    ):
        make(two_stages, ("stages.second.init", "stage:first@pre_anneal"))
