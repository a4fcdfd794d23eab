"""The window of an average in steps, the stages that start from one, and refusals."""

import pytest
from plans import INFINITE, stage, text_of

from titan_cpt.common.weights.averaging import Averaging
from titan_cpt.errors import ConfigError, PlanError
from titan_cpt.planning.plan_json import plan_as_json

RAMP = '{ "0" = 4, "640" = 20 }'  # ten steps of 4 sequences of 16 tokens, then steps of 20


def table(**keys):
    """A table [averaging]."""
    return "\n[averaging]\n" + "\n".join(f"{key} = {value}" for key, value in keys.items()) + "\n"


@pytest.mark.parametrize(
    ("keys", "size", "every"),
    [
        ({}, 10, 4),  # a fifth of 200 steps, in tenths
        ({"last": "0.5"}, 10, 10),
        ({"last": 100, "every": 30}, 4, 30),
        ({"last": 5}, 5, 1),
        ({"last": '"3.2K"', "every": '"640"'}, 5, 2),  # steps of 320 tokens
        ({"last": '"12.5 steps"', "every": 5}, 3, 5),
        ({"last": 500, "every": 300}, 1, 200),  # a table for all stages may be longer than one of them
    ],
)
def test_window_and_distance_in_steps(head, make, keys, size, every):
    """Fractions of the stage, steps and tokens."""
    plan = make(head + table(kind='"mean"', **keys) + stage("a", "pile", 200))

    assert plan.stages[0].averaging == Averaging("mean", "sqrt", size, every, phase=200 % every)


def test_tokens_of_a_ramp_are_its_last_tokens(head, make):
    """10 steps of 64 tokens and 10 of 320: the last 3,328 tokens are 10 large steps and two small ones."""
    plan = make(head + table(kind='"ema"', last='"3328"', every=1) + stage("a", "pile", 20, global_batch_size=RAMP))

    assert plan.stages[0].averaging.size == 12


def test_a_snapshot_is_taken_before_the_annealing(head, make):
    """An infinite schedule of 100 steps anneals from step 85 on."""
    averaging = (
        make(head + table(kind='"mean"', last=30, every=7) + stage("a", "pile", 100, INFINITE)).stages[0].averaging
    )

    assert averaging.due(85)
    assert not averaging.due(84)


def test_a_stage_has_a_table_of_its_own(head, make):
    """In place of the run's, or none at all; fingerprints do not change."""
    stages = [
        stage("a", "pile", 20),
        stage("b", "pile", 20, averaging='{ kind = "ema", last = 4, every = 2, keep_on = "device" }'),
        stage("c", "pile", 20, averaging='"off"'),
    ]
    plan = make(head + table(kind='"like_decay"', shape='"cosine"', last=6, every=3) + "".join(stages))

    assert [each.averaging for each in plan.stages] == [
        Averaging("like_decay", "cosine", 2, 3, 2),
        Averaging("ema", "sqrt", 2, 2, 0, on_host=False),
        None,
    ]
    assert plan.fingerprint == make(head + "".join(stage(name, "pile", 20) for name in "abc")).fingerprint


def test_a_stage_from_an_average_has_its_settings_in_the_recipe(head, make):
    """Other settings are other weights."""
    stages = stage("a", "pile", 20) + stage("b", "pile", 20, init='"stage:a@average"')
    plans = [make(head + table(kind='"mean"', last=last) + stages) for last in (10, 20)]

    assert plans[0].stages[1].recipe["init"] == "a@20@average"
    assert plans[0].stages[1].recipe["init.averaging.size"] == 10
    assert plans[0].fingerprint != plans[1].fingerprint


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"last": 0}, r"averaging.last: must be above 0, got 0"),
        ({"every": "0.0"}, r"averaging.every: must be above 0, got 0.0"),
    ],
)
def test_no_window_at_all_is_refused(head, make, keys, message):
    """A length of 0 steps, one problem however many stages have the table."""
    with pytest.raises(PlanError, match=message) as refused:
        make(head + table(kind='"mean"', **keys) + stage("a", "pile", 20) + stage("b", "pile", 20))
    assert "1 problem in" in str(refused.value)


def test_a_shape_without_a_decay_is_refused(head, make):
    """A mean has none."""
    with pytest.raises(ConfigError, match='averaging: shape is for kind = "like_decay", got kind = "mean"'):
        make(head + table(kind='"mean"', shape='"sqrt"') + stage("a", "pile", 20))


def test_an_average_that_does_not_exist_is_refused(head, make):
    """The earlier stage keeps none, or has no snapshot by its pre-anneal point."""
    second = stage("b", "pile", 20, init='"stage:a@average"')
    with pytest.raises(PlanError, match=r"stages.b.init: stage 'a' keeps no average of its weights: add a table"):
        make(head + stage("a", "pile", 20) + second)
    early = stage(
        "a", "pile", 20, 'schedule = "wsd", max = 1e-3, decay_from = 0, decay = "linear"', averaging='{ kind = "mean" }'
    )
    second = stage("b", "pile", 20, init='"stage:a@pre_anneal@average"')
    with pytest.raises(
        PlanError, match=r"stages.b.init: stage 'a' has no snapshot for an average by step 0; its first"
    ):
        make(head + early + second)


@pytest.mark.parametrize(
    ("keys", "device", "host", "saved"),
    [
        ({}, 0, 6, 5),  # four snapshots, the average, and the weights while the average is validated
        ({"keep_on": '"device"'}, 6, 0, 5),
        ({"kind": '"ema"'}, 0, 2, 1),
    ],
)
def test_memory_and_disk_count_the_copies(head, make, keys, device, host, saved):
    """Each copy is as large as the weights, 4 bytes a parameter; a stage's end keeps no snapshots."""
    plain = make(head + stage("a", "pile", 20))
    plan = make(head + table(**{"kind": '"mean"', "last": 8, "every": 2, **keys}) + stage("a", "pile", 20))
    weights = 4 * plan.spec.parameters

    assert plan.footprint.memory - plain.footprint.memory == device * weights
    assert plan.footprint.host == host * weights
    # Two interval checkpoints, one that is being written, and the end.
    assert plan.disk_bytes(2) - plain.disk_bytes(2) == (3 * saved + 1) * weights


def test_the_plan_says_what_an_average_is(head, make):
    """Kind, window and copies, in text (once for stages with equal ones) and JSON."""
    averaged = table(kind='"like_decay"', shape='"cosine"', last=8, every=2)
    plan = make(head + averaged + stage("a", "pile", 20) + stage("b", "pile", 20))

    assert (
        "average of a, b: mean weighted like an LR decay (cosine); a window of 4 snapshots, 2 steps apart; copies of "
        "the weights: 6 in host memory, 5 in a checkpoint within the stage, one at its end"
    ) in text_of(plan)
    as_json, _ = plan_as_json(plan)["stages"]
    assert as_json["averaging"] == {"kind": "like_decay", "shape": "cosine", "size": 4, "every": 2, "on_host": True}
