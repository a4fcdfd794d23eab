"""lr = { schedule = "continue" }: one LR schedule over several stages."""

import math
import re
from fractions import Fraction

import pytest
from plans import COSINE, datasets, stage

from titan_cpt.common.batch_sizes import BatchPhase, BatchSizes
from titan_cpt.config.lr import ContinueLR
from titan_cpt.config.stages import StageConfig
from titan_cpt.errors import ConfigError, PlanError
from titan_cpt.planning.plan_json import lr_as_json, plan_as_json
from titan_cpt.planning.stages.lr_span import StageLength, lr_spans

CONTINUE = 'schedule = "continue"'
INFINITE = 'schedule = "infinite_cosine", max = 1e-3, constant = 5e-4, warmup_until = 4, cooldown_until = 0.3, '
WSD = 'schedule = "wsd", max = 1e-3, decay = "linear", '


def three(first, budgets=(50, 30, 20), **more):
    """[[stages]] of one schedule: a, b and c."""
    later = {name: more.pop(name, {}) for name in ("b", "c")}
    return (
        stage("a", "pile", budgets[0], first)
        + stage("b", "german", budgets[1], CONTINUE, **later["b"])
        + stage("c", "pile", budgets[2], CONTINUE, **later["c"])
    )


@pytest.mark.parametrize(
    "lr",
    [
        f"{COSINE}, warmup_until = 0.07",
        f'{COSINE}, warmup_until = "9280"',
        'schedule = "linear", max = 1e-3, warmup_until = 60',
        f"{INFINITE} constant_until = 0.6",
        f"{INFINITE} constant_until = 0.6".replace("_cosine", "_inv_sqrt"),
        f"{WSD} decay_from = 0.5",
        'schedule = "inv_sqrt", max = 1e-3, timescale = 0.1',
        'schedule = "constant", max = 1e-3, warmup_until = 0.7',
    ],
)
def test_the_lr_is_that_of_one_stage_of_the_same_length(head, make, lr):
    """Every step of 50 + 30 + 20 has the LR that it has in a stage of 100 steps, bit for bit."""
    whole = make(head + stage("a", "pile", 100, lr)).stages[0]
    cut = make(head + three(lr))

    assert [s.lr_at(step) for s in cut.stages for step in range(s.steps)] == [whole.lr_at(step) for step in range(100)]


def test_first_peak_and_last_lr_in_the_plan_are_those_of_the_stages_part(head, make):
    """A linear decay from 1e-3 to 0 over 100 steps, cut at 50 and 80; plan.json names the stage with the schedule."""
    plan = make(head + three('schedule = "linear", max = 1e-3, min = 0, warmup_until = 0'))
    rows = plan_as_json(plan)["stages"]

    assert [row["start_lr"] for row in rows] == pytest.approx([9.9e-4, 4.9e-4, 1.9e-4])
    assert [row["peak_lr"] for row in rows] == pytest.approx([9.9e-4, 4.9e-4, 1.9e-4])
    assert [row["final_lr"] for row in rows] == pytest.approx([5e-4, 2e-4, 0])
    assert [row["lr_continues"] for row in rows] == [None, "a", "a"]
    assert [row["optimizer_state"] for row in rows] == ["reset", "keep", "keep"]
    assert lr_as_json(plan, (1, 30, 99))["b"] == {
        "1": rows[1]["start_lr"],
        "30": rows[1]["final_lr"],
        "99": rows[1]["final_lr"],
    }


def test_the_peak_of_a_part_is_beside_the_border_of_two_phases(head, make):
    """Warm-up ends after 60 steps, in b: there b has its peak, and a has it at its end."""
    a, b, c = make(head + three('schedule = "linear", max = 1e-3, min = 0, warmup_until = 60')).stages

    assert (a.peak_lr, b.peak_lr) == pytest.approx((1e-3 * 50 / 60, 1e-3))
    assert c.peak_lr == c.lr_at(0)


def test_a_stage_that_continues_starts_from_the_end_of_the_stage_before_with_its_optimizer(head, make):
    """Also after an infinite schedule whose annealing has begun, where `previous` means the step before it."""
    a, b, c = make(head + three(f"{INFINITE} constant_until = 0.4")).stages

    assert (b.init.stage, b.init.steps_done) == ("a", 50)
    assert (c.init.stage, c.init.steps_done) == ("b", 30)
    assert (a.keep_optimizer, b.keep_optimizer, c.keep_optimizer) == (False, True, True)
    assert (b.recipe["optimizer_state"], b.recipe["lr.schedule"]) == ("keep", "continue")


@pytest.mark.parametrize(
    ("until", "points", "start"),
    [
        ("0.4", (40, None, None), ("a", 40)),
        ("50", (None, 0, None), ("b", 0)),
        ("0.799", (None, 29, None), ("b", 29)),
        ("0.8", (None, None, 0), ("c", 0)),
        ("1.0", (None, None, None), ("c", 20)),
    ],
)
def test_the_pre_anneal_point_is_in_the_stage_where_annealing_begins(head, make, until, points, start):
    """In one stage of the span only; `previous` of the stage after the span finds it there."""
    after = stage("d", "german", 10, f"{INFINITE} constant_until = 1.0".replace("= 4", "= 0").replace("0.3", "0"))
    plan = make(head + three(f"{INFINITE} constant_until = {until}") + after)

    assert tuple(s.pre_anneal_step for s in plan.stages[:3]) == points
    assert (plan.stages[3].init.stage, plan.stages[3].init.steps_done) == start
    lacking = [note for note in plan.notes if "its weights lack the stages after it" in note]
    assert len(lacking) == (start[0] != "c")


def test_a_pre_anneal_point_by_name_is_found_in_its_stage_and_refused_elsewhere(head, make):
    """The message names the stage in which the annealing begins."""
    spanned = head + three(f"{WSD} decay_from = 0.6")
    named = make(spanned + stage("d", "pile", 10, init='"stage:b@pre_anneal"'))

    assert (named.stages[3].init.stage, named.stages[3].init.steps_done) == ("b", 10)
    for other in ("a", "c"):
        with pytest.raises(PlanError, match=re.escape("write stage:b@pre_anneal")):
            make(spanned + stage("d", "pile", 10, init=f'"stage:{other}@pre_anneal"'))


def test_end_points_in_tokens_go_through_the_stages_token_counts():
    """10 steps of 4 x 8 tokens, then 2 x 16 for 3 steps and 5 x 16: by hand, also after the end."""
    ramp = BatchSizes((BatchPhase(0, 0, 2), BatchPhase(3, 6, 5)))
    lengths = [StageLength("a", 10, 8, BatchSizes.constant(4)), StageLength("b", 5, 16, ramp)]
    first = StageConfig.model_construct(name="a", lr=None)
    span = lr_spans([first, StageConfig.model_construct(name="b", lr=ContinueLR(schedule="continue"))], lengths)["b"]

    assert (span.steps, span.steps_before("a"), span.steps_before("b"), span.first) == (15, 0, 10, first)
    assert [span.step_at(tokens) for tokens in (0, 16, 320)] == [0, Fraction(1, 2), 10]
    assert [span.step_at(320 + tokens) for tokens in (48, 96, 136, 256, 336)] == [
        Fraction("11.5"),
        13,
        Fraction("13.5"),
        15,
        16,
    ]


def test_the_recipe_has_the_spans_length_only_where_it_changes_an_lr(head, make):
    """A schedule without continuation has today's recipe; a constant phase does not depend on what follows it."""

    def recorded(text):
        return [s.recipe.get("lr.span_steps") for s in make(head + text).stages]

    assert recorded(stage("a", "pile", 50)) == [None]
    assert recorded(three(COSINE)) == [100, 100, 100]
    assert recorded(three(f"{WSD} decay_from = 50")) == [None, 100, 100]
    assert recorded(three(f"{WSD} decay_from = 49")) == [100, 100, 100]
    assert recorded(three(f"{INFINITE.replace('0.3', '30')} constant_until = 80")) == [None, None, 100]
    assert recorded(three('schedule = "constant", max = 1e-3')) == [None, None, None]
    assert recorded(three('schedule = "inv_sqrt", max = 1e-3, timescale = 5')) == [None, None, None]


def test_a_later_end_changes_the_recipe_exactly_where_it_changes_the_lr(head, make):
    """With c appended, the recipe of a changes if and only if the LR of one of its steps does."""
    wsd = f"{WSD} warmup_until = 5, "
    for lr in (COSINE, f"{COSINE}, warmup_until = 50", f"{wsd} decay_from = 0.5", f"{wsd} decay_from = 50"):
        short = make(head + stage("a", "pile", 50, lr)).stages[0]
        spanned = make(head + three(lr)).stages[0]
        same_lr = all(math.isclose(short.lr_at(s), spanned.lr_at(s), rel_tol=1e-12) for s in range(50))

        assert (short.recipe == spanned.recipe) == same_lr, lr


def test_no_note_on_the_lr_of_a_stage_that_continues(head, make):
    """Warm-up over two stages, then decay: no stage has a schedule that jumps, re-warms or stays low."""
    text = stage("before", "pile", 10) + three(f"{COSINE}, warmup_until = 55", b={"replay": "{ fraction = 0.5 }"})

    assert [note for note in make(head + text).notes if ".lr:" in note] == []


def test_faults_of_a_spanned_schedule_are_reported_once_at_its_first_stage(head, make):
    """With the stages that it spans, as the steps of one of them would not explain the message."""
    with pytest.raises(PlanError) as refused:
        make(head + three(f"{WSD} decay_from = 120"))

    assert str(refused.value).count("decay_from") == 1
    assert "stages.a.lr: decay_from is an end point" in str(refused.value)
    assert "it spans a, b, c: 100 steps" in str(refused.value)


@pytest.mark.parametrize(
    ("stages", "fault"),
    [
        (stage("a", "pile", 10, CONTINUE), "stages.a.lr.schedule: .* this stage is the first"),
        (three(COSINE, b={"init": '"random"'}), "stages.b.init: .* got 'random'"),
        (three(COSINE, c={"init": '"stage:a"'}), "stages.c.init: .*'b', got 'stage:a'"),
        (three(COSINE, c={"init": '"stage:b@pre_anneal"'}), "stages.c.init: .* got 'stage:b@pre_anneal'"),
        (three(COSINE, b={"optimizer_state": '"reset"'}), "stages.b.optimizer_state: .* got 'reset'"),
        (stage("a", "pile", 10) + stage("b", "pile", 10, f"{CONTINUE}, max = 1e-3"), "stages.b.lr.max: unknown key"),
    ],
)
def test_what_one_schedule_over_several_stages_excludes(head, make, stages, fault):
    """Other initial weights, a reset optimizer, keys of a schedule, no stage before."""
    with pytest.raises(ConfigError, match=fault):
        make(head + datasets() + stages)


def test_the_stage_before_may_be_named(head, make):
    """init = "previous" and "stage:NAME" of the stage before, and optimizer_state = "keep", are what happens anyway."""
    said = three(COSINE, b={"init": '"previous"'}, c={"init": '"stage:b"', "optimizer_state": '"keep"'})

    assert make(head + said).fingerprint == make(head + three(COSINE)).fingerprint
