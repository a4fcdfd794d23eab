"""The plan of a stage with Reptile: pulls, recipe, memory, disk, refusals."""

import pytest
from plans import stage, text_of

from titan_cpt.errors import ConfigError
from titan_cpt.planning.plan_json import plan_as_json

PULL = {"reptile": "{ every = 6, step = 0.1 }"}


def test_the_plan_says_when_weights_are_pulled_and_what_it_costs(head, make):
    """After 6, 12 and 18 of 20 steps; a float32 copy of the weights on the host, and in each of three checkpoints."""
    plain, pulled = (make(head + stage("a", "pile", 20, **more)) for more in ({}, PULL))
    copy = 4 * plain.spec.parameters
    before, after = (plan_as_json(plan)["layout"] for plan in (plain, pulled))

    assert plan_as_json(pulled)["stages"][0]["reptile"] == {"every": 6, "step": 0.1, "on_host": True, "pulls": 3}
    assert plan_as_json(plain)["stages"][0]["reptile"] is None
    assert after["bytes_per_rank"] == {**before["bytes_per_rank"], "in_host_memory": copy}
    assert after["stages"]["a"]["bytes_in_host_memory"] == copy
    assert pulled.disk_bytes(keep_latest_k=1) - plain.disk_bytes(keep_latest_k=1) == 3 * copy
    text = text_of(pulled)
    assert "Reptile in a: after every 6 steps the weights become old + 0.1 x (new - old), 3 times" in text
    assert "host memory per rank: 0.57 MiB (copies of the weights)" in text
    recipes = [plan.stages[0].recipe for plan in (pulled, plain)]
    assert recipes[0] == {**recipes[1], "reptile.every": 6, "reptile.step": 0.1}


def test_old_weights_on_the_device_count_there(head, make):
    """With CPU offload the weights are in host memory, and so are the old ones."""
    there = {"reptile": '{ every = 6, step = 0.1, keep_on = "device" }'}
    plain, pulled = (make(head + stage("a", "pile", 20, **more)) for more in ({}, there))
    costs, copy = pulled.footprint, 4 * plain.spec.parameters
    offloaded = make(head + stage("a", "pile", 20, **there), ("training.enable_cpu_offload", "true"), world_size=2)

    assert (costs.weight_copies, costs.host) == (copy, 0)
    assert costs.memory == plain.footprint.memory + copy
    assert plan_as_json(pulled)["layout"]["bytes_per_rank"]["weight_copies"] == copy
    assert offloaded.footprint.weight_copies == 0
    assert offloaded.footprint.host_copies == offloaded.footprint.host / 5


def test_what_pulls_nothing_is_noted(head, make):
    """step = 1, and an interval longer than the stage: both train as without. A branch may be longer than the stage."""
    for table, note, keeps_old in (
        ("{ every = 6, step = 1 }", "with step = 1 no weight is pulled", False),
        ("{ every = 21, step = 0.1 }", "every = 21 is more than the stage's 20 steps, so that no weight is", True),
    ):
        plan = make(head + stage("a", "pile", 20, reptile=table))
        assert [one for one in plan.notes if "stages.a.reptile" in one and note in one]
        assert (plan.stages[0].reptile is not None) == keeps_old
    assert make(head + stage("a", "pile", 20, reptile="{ every = 20, step = 0.1 }")).stages[0].reptile.is_due(20)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{ every = 6 }", "stages.a.reptile.step: is missing"),
        ("{ step = 0.1 }", "stages.a.reptile.every: is missing"),
        ("{ every = 0, step = 0.1 }", "stages.a.reptile.every: must be >= 1, got 0"),
        ("{ every = 6, step = 0 }", r"stages.a.reptile.step: must be in \(0, 1\], got 0"),
        ("{ every = 6, step = 1.5 }", r"stages.a.reptile.step: must be in \(0, 1\], got 1.5"),
        ('{ every = 6, step = 0.1, keep_on = "gpu" }', "stages.a.reptile.keep_on: must be one of 'host', 'device'"),
        ("0.1", "stages.a.reptile: must be a table"),
    ],
)
def test_bad_tables_are_refused(head, make, table, message):
    """With the key and what is allowed."""
    with pytest.raises(ConfigError, match=message):
        make(head + stage("a", "pile", 20, reptile=table))
