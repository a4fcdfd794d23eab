"""Options of a merge: defaults, and every problem in one message."""

import pytest

from titan_cpt.checkpoint.merge.settings import METHODS, MergeSettings, merge_settings
from titan_cpt.cli import make_parser
from titan_cpt.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "expected", "described"),
    [
        ({}, MergeSettings("mean", (1, 1)), "mean: equal weights"),
        (
            {"weights": [7, 3]},
            MergeSettings("linear", (7, 3)),
            "linear: weights 0.7, 0.3 (7, 3, divided by their sum)",
        ),
        ({"weights": [0.75, 0.25]}, MergeSettings("linear", (0.75, 0.25)), "linear: weights 0.75, 0.25"),
        ({"method": "slerp"}, MergeSettings("slerp", (1, 1)), "slerp: equal weights, t = 0.5"),
        (
            {"method": "slerp", "weights": (0.75, 0.25)},
            MergeSettings("slerp", (0.75, 0.25)),
            "slerp: weights 0.75, 0.25, t = 0.25",
        ),
        (
            {"method": "ties", "has_base": True},
            MergeSettings("ties", (1, 1), density=0.2),
            "ties: equal weights, density 0.2, scale 1",
        ),
        (
            {"method": "task-arithmetic", "has_base": True, "weights": (1, -0.5), "scale": 0.4},
            MergeSettings("task-arithmetic", (1, -0.5), scale=0.4),
            "task-arithmetic: weights 1, -0.5, scale 0.4",
        ),
    ],
)
def test_settings_say_what_is_computed(options, expected, described):
    """Two inputs; weights are divided by their sum, except those of task vectors."""
    settings = merge_settings(2, **options)

    assert settings == expected
    assert settings.describe() == described


@pytest.mark.parametrize(
    ("inputs", "options", "says"),
    [
        (2, {"method": "avarage"}, ["method: must be one of 'mean', 'linear'", "got 'avarage'"]),
        (1, {}, ["mean takes 2 inputs or more, got 1"]),
        (3, {"method": "slerp"}, ["slerp takes two inputs, got 3"]),
        (2, {"method": "ties"}, ["ties needs base"]),
        (2, {"has_base": True, "scale": 2}, ["2 problems", "base: goes with ties", "scale: goes with ties"]),
        (2, {"method": "linear"}, ["linear needs weights"]),
        (2, {"method": "mean", "weights": [1, 2]}, ["weights: mean weighs all inputs equally"]),
        (2, {"weights": [1, 2, 3]}, ["weights: needs one for each of the 2 inputs, got 3: 1, 2, 3"]),
        (2, {"weights": [1, -1]}, ["must be above 0, got 1, -1"]),
        (2, {"weights": [1, float("nan")]}, ["must be finite numbers"]),
        (2, {"method": "slerp", "weights": [2, -1]}, ["slerp takes weights of 0 or more"]),
        (2, {"density": 0.5}, ["density: goes with ties, not with mean"]),
        (2, {"method": "ties", "has_base": True, "density": 0}, ["density: must be above 0 and at most 1, got 0"]),
        (2, {"method": "ties", "has_base": True, "scale": float("inf")}, ["scale: must be a finite number"]),
    ],
)
def test_every_problem_is_reported(inputs, options, says):
    """In one message, with what was found and what is allowed."""
    with pytest.raises(ConfigError) as raised:
        merge_settings(inputs, **options)

    assert all(text in str(raised.value) for text in says)


def test_the_command_line_offers_every_method():
    """Its parser may not import the module of the settings."""
    command = next(action.choices["merge"] for action in make_parser()._actions if action.dest == "command")

    assert tuple(next(action.choices for action in command._actions if action.dest == "method")) == METHODS
