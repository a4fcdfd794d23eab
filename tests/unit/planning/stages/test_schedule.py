"""From the lr table of a stage to its schedule: end points, first, highest and last LR, the final window."""

import pytest
from plans import COSINE, INFINITE, stage

from titan_cpt.planning.plan_json import lr_as_json, plan_as_json
from titan_cpt.planning.stages.schedule import final_window


@pytest.mark.parametrize(
    ("position", "end"),
    [("0.29", 29.0), ("0.57", 57.0), ("0.07", 7.0), ("29", 29.0), ('"9280"', 29.0), ('"9.28K"', 29.0), ("0.285", 28.5)],
)
def test_end_points_are_exact(head, make, position, end):
    """0.29 x 100 is step 29, not 28.999...; tokens count in steps of 320; a share may be between two steps."""
    plan = make(head + stage("a", "pile", 100, f"{COSINE}, warmup_until = {position}"))

    assert plan.stages[0].schedule[0].end == end


def test_step_s_uses_eta_of_s_plus_one(head, make):
    """No step has LR 0: with four warm-up steps the first has a quarter of max; the last has min."""
    first = make(head + stage("a", "pile", 100, f"{COSINE}, warmup_until = 4")).stages[0]

    assert [first.lr_at(step) for step in range(4)] == [0.25e-3, 0.5e-3, 0.75e-3, 1e-3]
    assert first.lr_at(99) == 1e-4


@pytest.mark.parametrize(
    ("lr", "start", "peak", "final"),
    [
        ('schedule = "cosine", max = 1e-3, warmup_until = 10', 1e-4, 1e-3, 1e-4),
        ('schedule = "linear", max = 1e-3, min = 0, warmup_until = 0', 9.9e-4, 9.9e-4, 0.0),
        ('schedule = "constant", max = 1e-3', 1e-3, 1e-3, 1e-3),
        ('schedule = "constant", max = 1e-3, warmup_until = 0.5', 2e-5, 1e-3, 1e-3),
        (INFINITE, 1e-3, 1e-3, 1e-4),
        (INFINITE.replace("0.85", "1.0"), 1e-3, 1e-3, 5e-4),
        (
            'schedule = "infinite_cosine", constant = 5e-4, warmup_until = 0, cooldown_until = 0, constant_until = 0.5',
            5e-4,
            5e-4,
            5e-5,
        ),
        (
            'schedule = "infinite_inv_sqrt", max = 1e-3, constant = 5e-4, warmup_until = 0.025, cooldown_until = 0.6, '
            "constant_until = 0.85, alpha = 0.001",
            4e-4,
            1e-3,
            1e-4,
        ),
        ('schedule = "wsd", max = 1e-3, warmup_until = 0.1, decay_from = 0.8, decay = "cosine"', 1e-4, 1e-3, 1e-4),
        ('schedule = "inv_sqrt", max = 1e-3, warmup_until = 1, timescale = 33', 1e-3, 1e-3, 5e-4),
    ],
)
def test_every_schedule_has_the_configured_first_highest_and_last_lr(head, make, lr, start, peak, final):
    """Computed by hand; the default of min is a tenth of max, or of constant without max."""
    (answer,) = plan_as_json(make(head + stage("a", "pile", 100, lr)))["stages"]

    assert answer["start_lr"] == pytest.approx(start, rel=1e-12)
    assert answer["peak_lr"] == pytest.approx(peak, rel=0.01)  # between two steps where the warm-up ends there
    assert answer["final_lr"] == pytest.approx(final, rel=1e-12)


def test_the_schedules_of_the_paper_have_its_values(head, make):
    """Through the config, for 132,366 steps and end points 0.01 / 0.60 / 0.85: both cool-downs and the plain cosine."""
    infinite = (
        "max = 3e-4, constant = 1.65e-4, min = 3e-5, warmup_until = 0.01, cooldown_until = 0.6, constant_until = 0.85"
    )
    text = (
        head
        + stage("cosine", "pile", 132_366, 'schedule = "cosine", max = 3e-4, min = 3e-5')
        + stage("infinite", "pile", 132_366, f'schedule = "infinite_cosine", {infinite}')
        + stage("inv_sqrt", "pile", 132_366, f'schedule = "infinite_inv_sqrt", {infinite}')
    )
    found = lr_as_json(make(text), (1, 662, 20_000, 100_000, 132_366, 10**6))

    assert {name: [f"{lr:.6e}" for lr in lrs.values()] for name, lrs in found.items()} == {
        "cosine": ["2.266443e-07", "1.500385e-04", "2.866925e-04", "6.864185e-05", "3.000000e-05", "3.000000e-05"],
        "infinite": ["2.266443e-07", "1.500385e-04", "2.818292e-04", "1.650000e-04", "3.000000e-05", "3.000000e-05"],
        "inv_sqrt": ["2.266443e-07", "1.500385e-04", "2.116752e-04", "1.650000e-04", "3.000000e-05", "3.000000e-05"],
    }


def test_the_final_window_is_the_papers():
    """The last 100 steps sampled every 10: ten samples, the last step among them; none before the first step."""
    assert final_window(1000, 100, 10) == (910, 920, 930, 940, 950, 960, 970, 980, 990, 1000)
    assert final_window(25, 100, 10) == (5, 15, 25)
    assert final_window(20, 100, 10) == (10, 20)
    assert final_window(1000, 1, 10) == (1000,)
    assert final_window(1000, 0, 10) == ()


def test_the_final_window_follows_the_config(one_stage, make):
    """Off by default; validation.final_window_steps and final_window_every enable it."""
    asked = make(one_stage, ("validation.final_window_steps", "50"), ("validation.final_window_every", "25"))

    assert make(one_stage).stages[0].final_window == ()
    assert asked.stages[0].final_window == (75, 100)
