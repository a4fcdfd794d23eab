"""Curves of the report: which runs share one, and their points."""

import json

import pytest

from titan_cpt.reporting.curves import curve_groups, recorded_steps, replay_curves, training_curves
from titan_cpt.reporting.run_log import read_run
from unit.reporting.run_folders import EN_DE, STEP_TOKENS, stage, trained, use


def run_of_steps(write_run, lines, *, name="r", steps=1000):
    folder = write_run(name, [], [stage("a", steps, ["en"], steps, en=use(1000))], begun="")
    folder.joinpath("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_run(folder)


def test_up_to_eight_runs_are_not_grouped(write_run):
    """Seeds too: each has its curve and its name."""
    runs = [read_run(write_run(f"x_seed-{n}", EN_DE)) for n in range(8)]

    assert [group.name for group in curve_groups(runs)] == [f"x_seed-{n}" for n in range(8)]


def test_without_a_config_seeds_are_grouped_by_name_and_plan(write_run):
    """Run folders of which only plan.json and metrics.jsonl were kept; a run with another plan has its own curve."""
    runs = [read_run(write_run(f"x_seed-{n}", EN_DE)) for n in range(8)]
    other = [stage("a", 10, ["en"], 10, en=use(9000)), stage("b", 10, ["de"], 20, de=use(9500))]
    runs.append(read_run(write_run("x_seed-8", EN_DE, other)))
    runs.append(read_run(write_run("y", EN_DE)))

    assert [(group.name, len(group.runs)) for group in curve_groups(runs)] == [
        ("x (8 seeds)", 8),
        ("x_seed-8", 1),
        ("y", 1),
    ]


def test_a_smoothed_value_is_the_mean_of_the_last_40th_of_the_steps(write_run):
    """80 steps with losses 1 to 80: each value is the mean of two, the first one itself."""
    lines = [trained("a", step, step, 1e-3) | {"loss_nats_per_token": float(step)} for step in range(1, 81)]
    run = run_of_steps(write_run, lines)
    (smooth,) = training_curves(curve_groups([run]), "loss_nats_per_token", smooth=True)
    (raw,) = training_curves(curve_groups([run]), "loss_nats_per_token")

    assert smooth.values == pytest.approx([1.0, *(step - 0.5 for step in range(2, 81))])
    assert raw.values == list(range(1, 81))
    assert raw.tokens == [step * STEP_TOKENS for step in range(1, 81)]


def test_a_long_run_is_drawn_with_few_points_and_its_last_one(write_run):
    """1001 steps: every third one, and the last."""
    lines = [trained("a", step, step, 1e-3) for step in range(1, 1002)]
    steps = [line["step"] for line in recorded_steps(run_of_steps(write_run, lines, steps=1001))]

    assert steps == [*range(1, 1001, 3), 1001]


def test_the_replay_curve_is_in_percent_of_the_steps_tokens(write_run):
    """250 of 1000 tokens."""
    lines = [trained("a", step, step, 1e-3) | {"replayed_tokens": 250} for step in (1, 2)]
    (curve,) = replay_curves(curve_groups([run_of_steps(write_run, lines)]))

    assert curve.values == [25.0, 25.0]


def test_replay_of_a_stage_with_unrecorded_steps_is_the_planned_one(write_run):
    """Steps 2, 4, ... of 10 replay 100 of 1000 tokens, the others none: 5 percent, not 10."""
    lines = [trained("b", step, 10 + step, 1e-3) | {"replayed_tokens": 100} for step in (2, 4, 6, 8, 10)]
    (curve,) = replay_curves(curve_groups([read_run(write_run("r", lines, begun=""))]))

    assert curve.values == [5.0] * 5
