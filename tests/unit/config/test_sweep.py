"""The [sweep] table: its combinations of values, their names, and invalid tables."""

import pytest
from sweeps import FRACTION

from titan_cpt.config.sweep import SweepFitConfig, point_names, points, sweep_faults


def test_keys_are_crossed_and_the_last_one_changes_fastest():
    """Two fractions by two seeds are four runs, however the keys are written."""
    table = {"stages": {"german": {"replay": {"fraction": [0.0, 0.05]}}}, "job.seed": [1, 2]}

    assert points(table) == [
        {FRACTION: 0.0, "job.seed": 1},
        {FRACTION: 0.0, "job.seed": 2},
        {FRACTION: 0.05, "job.seed": 1},
        {FRACTION: 0.05, "job.seed": 2},
    ]
    assert point_names(points(table)) == ["fraction-0_seed-1", "fraction-0_seed-2"] + [
        f"fraction-0.05_seed-{seed}" for seed in (1, 2)
    ]


def test_zipped_keys_change_together_and_are_crossed_with_the_rest():
    """Two seeds by two pairs of (max, min)."""
    table = {"job.seed": [1, 2], "zip": {"stages.a.lr.max": [1e-3, 2e-3], "stages.a.lr.min": [1e-4, 3e-5]}}
    found = [tuple(point.values()) for point in points(table)]

    assert found == [(1, 1e-3, 1e-4), (1, 2e-3, 3e-5), (2, 1e-3, 1e-4), (2, 2e-3, 3e-5)]
    assert point_names(points(table))[1] == "seed-1_max-0.002_min-3e-5"


def test_names_distinguish_keys_of_two_stages_and_tables():
    """A name has the shortest unique end of each key, and of tables the entries that differ; all names are unique."""
    same_end = points({"stages.a.lr.max": [1e-3], "stages.b.lr.max": [1e-4, 2e-4]})
    curves = [{"schedule": "constant", "max": 3e-5}, {"schedule": "cosine", "max": 3e-5, "min": 0.0}]
    hidden = points({"job.description": ["a b", "a-b"]})

    assert point_names(same_end)[0] == "a.lr.max-0.001_b.lr.max-0.0001"
    assert point_names(points({"stages.a.lr": curves})) == ["lr-constant", "lr-cosine-0"]
    assert point_names(hidden) == ["description-a-b", "description-a-b_1"]


def test_names_are_names_of_folders_where_patterns_of_weights_are_swept():
    """`*` means all weights, and quotes around a pattern are not part of its name."""
    scales = points({"stages": {"a": {"lr_scale": {"blocks.*": [0.1], '"head.new"': [2.0]}}}})
    trained = points({"stages.a.trainable": ["*", ["head", "blocks.0-1"]]})

    assert point_names(scales) == ["all-0.1_new-2"]
    assert point_names(trained) == ["trainable-all", "trainable-head-blocks.0-1"]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"seed": [1]}, "sweep.seed: must be a dotted key"),
        ({"job.seed": 1}, "sweep.job.seed: must be a non-empty list of values, got 1"),
        ({"job.seed": []}, "sweep.job.seed: must be a non-empty list of values, got []"),
        ({"job.seed": [1, 1]}, "sweep.job.seed: has a value twice"),
        ({"job.name": ["a"]}, "sweep.job.name: cannot be swept"),
        ({"zip": {"a.b": [1, 2], "c.d": [1]}}, "sweep.zip: its lists are combined item by item"),
        ({"zip": {"a.b": [1, 1], "c.d": [1, 1]}}, "sweep.zip: has a combination twice"),
        ({"zip": [1]}, "sweep.zip: must be a dotted key"),
        ({"job.seed": [1], "job": {"seed": [2]}}, "sweep.job.seed: is set twice"),
    ],
)
def test_an_invalid_sweep_table_is_refused(table, expected):
    """The message has the key, what was found and what is allowed."""
    assert [fault for fault in sweep_faults(table) if fault.startswith(expected)]


def test_the_law_is_not_a_swept_key():
    """[sweep.fit] adds no runs; without weights each dataset of the objective counts once."""
    table = {"job.seed": [1, 2], "fit": {"law": "cmr", "objective": "de", "limit": {"en": 0.05}}}

    assert points(table) == [{"job.seed": 1}, {"job.seed": 2}]
    assert not list(sweep_faults(table))
    assert SweepFitConfig.model_validate(table["fit"]).weights == {"de": 1.0}
