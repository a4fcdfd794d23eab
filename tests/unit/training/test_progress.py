"""What a run prints: a line per step off a terminal, the time left, and where a stage starts in its data."""

import io
import math
import time

from rich.console import Console

from titan_cpt.training.progress import Display

LINE = {
    "step": 20,
    "run_step": 20,
    "loss_nats_per_token": 2.5,
    "lr": 1e-3,
    "tokens_per_s": 12_345.6,
    "mfu": 0.25,
    "tokens": 6400,
}


def display_of(plan, *, shown=True, steps_done=0):
    console = Console(width=200, file=io.StringIO(), force_terminal=False)
    return Display(plan, console, steps_done=steps_done, shown=shown), console.file


def test_a_step_is_a_line_with_the_time_left(make, two_stages, monkeypatch):
    """10 of 100 steps in 40 s after a resume at step 10: 80 steps of the stage and 130 of the run are left."""
    plan = make(two_stages)
    clock = iter([100.0, 140.0, 140.0, 140.0, 140.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    display, out = display_of(plan, steps_done=10)
    display.begin_stage(plan.stages[0], 10)
    display.step(plan.stages[0], LINE)
    display.step(plan.stages[0], {**LINE, "mfu": math.nan})
    display.end_stage()
    one, two = out.getvalue().splitlines()

    assert one == (
        "stage 1/2 first step 20/100  loss 2.5000  lr 1.00e-03  12,346 tokens/s  mfu 25%  0.01M tokens  "
        "eta 0:05:20 stage, 0:08:40 run"
    )
    assert two == one.replace("mfu 25%  ", "")


def test_the_time_left_is_unknown_before_the_first_step(make, two_stages):
    """Of this session."""
    plan = make(two_stages)
    display, out = display_of(plan, steps_done=20)
    display.step(plan.stages[0], LINE)

    assert out.getvalue().endswith("eta ? stage, ? run\n")


def test_other_ranks_print_nothing(make, two_stages):
    """Neither steps nor messages."""
    plan = make(two_stages)
    display, out = display_of(plan, shown=False)
    display.step(plan.stages[0], LINE)
    display.transition(plan.stages[0], {"weights": "new"})

    assert out.getvalue() == ""


def test_a_transition_shows_where_its_data_and_replay_start(make, two_stages):
    """The second stage replays 2,000 sequences of the first; new data is listed before replay."""
    plan = make(two_stages)
    display, out = display_of(plan)
    display.transition(plan.stages[1], {"weights": "from first", "lr": "0.001"})

    assert out.getvalue().splitlines() == [
        "stage second begins",
        "  weights   from first",
        "  lr        0.001",
        "  data      german starts at its first sequence",
        "  replay    of pile from sequence 0 of the 2,000 trained on",
    ]
