"""LR schedules: the paper's table, first and last step of every phase by hand, and properties of all schedules."""

import itertools
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from titan_cpt.planning import lr_schedules
from titan_cpt.planning.lr_schedules import lr_at, phase_at

T = 132_366
WARM, COOL, CONSTANT = 0.01 * T, 0.60 * T, 0.85 * T
RATES = {"peak": 3e-4, "constant_lr": 1.65e-4, "final": 3e-5}


def infinite(cooldown, **changes):
    points = {"warmup_until": WARM, "cooldown_until": COOL, "constant_until": CONSTANT, "end": T}
    return lr_schedules.infinite_schedule(cooldown=cooldown, **(points | RATES | changes))


def short_infinite(**changes):
    """100 steps: warm to 10, cool to 40, constant to 70, anneal."""
    points = {"warmup_until": 10, "cooldown_until": 40, "constant_until": 70, "end": 100}
    return infinite("cosine", **(points | {"peak": 3e-3, "constant_lr": 2e-3, "final": 1e-3} | changes))


# The paper's table


@pytest.mark.parametrize(
    ("t", "cosine", "inv_sqrt"),
    [
        (1, 2.266443e-07, 2.266443e-07),
        (662, 1.500385e-04, 1.500385e-04),
        (1324, 3.000000e-04, 2.999958e-04),
        (20_000, 2.818292e-04, 2.116752e-04),
        (40_000, 2.335091e-04, 1.859443e-04),
        (60_000, 1.845703e-04, 1.729661e-04),
        (80_744, 1.650000e-04, 1.650000e-04),
        (120_000, 8.674269e-05, 8.674269e-05),
        (132_366, 3.000000e-05, 3.000000e-05),
    ],
)
def test_infinite_schedules_have_the_values_of_the_authors_run(t, cosine, inv_sqrt):
    """Both cool-downs, to seven significant digits."""
    assert f"{lr_at(infinite('cosine'), t):.6e}" == f"{cosine:.6e}"
    assert f"{lr_at(infinite('inv_sqrt'), t):.6e}" == f"{inv_sqrt:.6e}"


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (662, 1.500385e-04),
        (20_000, 2.866925e-04),
        (66_183, 1.671419e-04),
        (100_000, 6.864185e-05),
        (132_366, 3.0e-05),
    ],
)
def test_cosine_has_the_values_of_the_authors_run(t, expected):
    """With a warm-up of 1 %, to seven significant digits."""
    schedule = lr_schedules.cosine_schedule(warmup_until=WARM, end=T, peak=3e-4, final=3e-5)

    assert f"{lr_at(schedule, t):.6e}" == f"{expected:.6e}"


def test_the_papers_numbers_are_end_points_and_not_durations():
    """0.01 / 0.60 / 0.85 start to anneal at 0.85 T and end at min; as durations they would never anneal."""
    schedule = infinite("cosine")

    assert lr_at(schedule, math.floor(CONSTANT)) == 1.65e-4
    assert lr_at(schedule, math.floor(CONSTANT) + 1) < 1.65e-4
    assert lr_at(schedule, T) == 3e-5
    assert [(phase.name, phase.start, phase.end) for phase in schedule] == [
        ("warmup", 0.0, WARM),
        ("cooldown", WARM, COOL),
        ("constant", COOL, CONSTANT),
        ("anneal", CONSTANT, T),
    ]


# First and last step of each phase, by hand


def test_warmup_reaches_the_peak_on_its_last_step_and_never_has_lr_zero():
    """peak t / t_w: with t_w = 10 the first step has a tenth of the peak, the tenth step the peak."""
    schedule = lr_schedules.cosine_schedule(warmup_until=10, end=110, peak=1.0, final=0.0)

    assert lr_at(schedule, 1) == pytest.approx(0.1, rel=1e-15)
    assert lr_at(schedule, 9) == pytest.approx(0.9, rel=1e-15)
    assert lr_at(schedule, 10) == 1.0
    assert lr_at(schedule, 0) == 0.0


def test_cosine_by_hand():
    """After t_w = 10 of 110: x = 0.01, 0.25, 0.5 and 1 of the half wave from 3 to 1."""
    schedule = lr_schedules.cosine_schedule(warmup_until=10, end=110, peak=3.0, final=1.0)

    assert lr_at(schedule, 11) == pytest.approx(2 + math.cos(math.radians(1.8)), rel=1e-14)
    assert lr_at(schedule, 35) == pytest.approx(2 + math.sqrt(0.5), rel=1e-14)
    assert lr_at(schedule, 60) == pytest.approx(2.0, rel=1e-14)
    assert lr_at(schedule, 110) == 1.0


def test_linear_by_hand():
    """A straight line from 3 after step 10 to 1 on step 110: 0.02 a step."""
    schedule = lr_schedules.linear_schedule(warmup_until=10, end=110, peak=3.0, final=1.0)

    assert lr_at(schedule, 10) == 3.0
    assert lr_at(schedule, 11) == pytest.approx(2.98, rel=1e-14)
    assert lr_at(schedule, 109) == pytest.approx(1.02, rel=1e-14)
    assert lr_at(schedule, 110) == 1.0


def test_constant_by_hand():
    """One LR from the end of the warm-up to the end, or from the first step without a warm-up."""
    warmed = lr_schedules.constant_schedule(warmup_until=4, end=10, peak=2.0)
    flat = lr_schedules.constant_schedule(warmup_until=0, end=10, peak=2.0)

    assert [lr_at(warmed, t) for t in (1, 2, 3, 4, 5, 10)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert {lr_at(flat, t) for t in range(11)} == {2.0}


def test_infinite_phases_by_hand():
    """Warm to 3 at 10, cosine to 2 at 40, constant to 70, then 2 (1/2)^x down to 1 at 100."""
    schedule = short_infinite(peak=3.0, constant_lr=2.0, final=1.0)

    assert lr_at(schedule, 1) == pytest.approx(0.3, rel=1e-15)
    assert lr_at(schedule, 10) == 3.0
    assert lr_at(schedule, 11) == pytest.approx(2.5 + 0.5 * math.cos(math.radians(6)), rel=1e-14)
    assert lr_at(schedule, 25) == pytest.approx(2.5, rel=1e-14)
    assert lr_at(schedule, 40) == 2.0
    assert lr_at(schedule, 41) == 2.0
    assert lr_at(schedule, 70) == 2.0
    assert lr_at(schedule, 71) == pytest.approx(2 * 0.5 ** (1 / 30), rel=1e-14)
    assert lr_at(schedule, 85) == pytest.approx(math.sqrt(2), rel=1e-14)
    assert lr_at(schedule, 100) == 1.0


def test_the_step_at_an_end_point_belongs_to_the_phase_that_ends_there():
    """Phases cover (start, end]: step 10 still warms up, step 11 cools down."""
    schedule = short_infinite()

    assert [phase_at(schedule, t) for t in (1, 10, 11, 40, 41, 70, 71, 100, 101)] == [
        "warmup",
        "warmup",
        "cooldown",
        "cooldown",
        "constant",
        "constant",
        "anneal",
        "anneal",
        "anneal",
    ]


def test_inverse_square_root_cooldown_by_hand():
    """alpha = 3 and x = 1/3, 1: h = 1/sqrt(2) - 1 and 1/2 - 1, so 3 falls by (2 - sqrt 2) of the way to 2."""
    schedule = infinite(
        "inv_sqrt",
        warmup_until=10,
        cooldown_until=40,
        constant_until=70,
        end=100,
        peak=3.0,
        constant_lr=2.0,
        final=1.0,
        alpha=3.0,
    )

    assert lr_at(schedule, 20) == pytest.approx(3 - (2 - math.sqrt(2)), rel=1e-14)
    assert lr_at(schedule, 40) == 2.0


def test_a_later_infinite_stage_starts_at_constant_and_can_anneal():
    """No warm-up and no cool-down: the first step has the constant LR, whatever the peak is."""
    schedule = short_infinite(warmup_until=0, cooldown_until=0)

    assert lr_at(schedule, 0) == lr_at(schedule, 1) == lr_at(schedule, 70) == 2e-3
    assert lr_at(schedule, 100) == 1e-3
    assert phase_at(schedule, 1) == "constant"


def test_an_infinite_stage_whose_constant_phase_fills_it_never_anneals():
    """constant_until = end: the last step has the constant LR."""
    schedule = short_infinite(constant_until=100)

    assert lr_at(schedule, 100) == lr_at(schedule, 1000) == 2e-3
    assert [phase.name for phase in schedule] == ["warmup", "cooldown", "constant"]


def test_a_cooldown_without_warmup_starts_at_the_peak():
    """warmup_until = 0, cooldown_until = 40: the first step is the cosine's."""
    schedule = short_infinite(warmup_until=0, peak=3.0, constant_lr=2.0, final=1.0)

    assert lr_at(schedule, 20) == pytest.approx(2.5, rel=1e-14)
    assert lr_at(schedule, 1) == pytest.approx(2.5 + 0.5 * math.cos(math.radians(4.5)), rel=1e-14)


@pytest.mark.parametrize(
    ("decay", "quarter"),
    [
        ("linear", 1 + 2 * 0.75),
        ("sqrt", 1 + 2 * 0.5),
        ("exponential", 3 * (1 / 3) ** 0.25),
        ("cosine", 2 + math.sqrt(0.5)),
    ],
)
def test_wsd_decays_by_hand(decay, quarter):
    """Stable at 3 to step 80, a quarter of the decay at step 85, 1 on step 100."""
    schedule = lr_schedules.wsd_schedule(warmup_until=10, decay_from=80, end=100, peak=3.0, final=1.0, decay=decay)

    assert lr_at(schedule, 5) == pytest.approx(1.5, rel=1e-15)
    assert lr_at(schedule, 10) == lr_at(schedule, 11) == lr_at(schedule, 80) == 3.0
    assert lr_at(schedule, 81) < 3.0
    assert lr_at(schedule, 85) == pytest.approx(quarter, rel=1e-14)
    assert lr_at(schedule, 100) == 1.0


def test_inverse_square_root_without_end_by_hand():
    """Timescale 30 after the warm-up: 1/sqrt(2) of the peak at 40, a half at 100, never below the floor."""
    schedule = lr_schedules.inv_sqrt_schedule(warmup_until=10, end=200, peak=1.0, floor=0.0, timescale=30)
    floored = lr_schedules.inv_sqrt_schedule(warmup_until=10, end=200, peak=1.0, floor=0.6, timescale=30)

    assert lr_at(schedule, 10) == 1.0
    assert lr_at(schedule, 11) == pytest.approx(math.sqrt(30 / 31), rel=1e-15)
    assert lr_at(schedule, 40) == pytest.approx(math.sqrt(0.5), rel=1e-15)
    assert lr_at(schedule, 100) == pytest.approx(0.5, rel=1e-15)
    assert lr_at(schedule, 200) == pytest.approx(math.sqrt(30 / 220), rel=1e-15)
    assert lr_at(floored, 40) == lr_at(schedule, 40)
    assert lr_at(floored, 100) == 0.6


def test_the_drop_of_the_inverse_square_root_is_the_papers():
    """h(1) = -0.69849 for alpha = 10: the LR is half-way down at the x for which h(x) is half of h(1)."""
    x = ((1 / (1 - 0.69849 / 2)) ** 2 - 1) / 10
    schedule = infinite("inv_sqrt", warmup_until=0, cooldown_until=1, constant_until=1, end=1, constant_lr=1e-4)

    assert lr_at(schedule, x) == pytest.approx(2e-4, rel=1e-5)


def test_a_minimum_of_zero_is_reached_exactly():
    """Cosine, linear, the inverse square root's floor and three of the four wsd decays end at 0, not near it."""
    ends = [
        lr_schedules.cosine_schedule(warmup_until=1, end=10, peak=1.0, final=0.0),
        lr_schedules.linear_schedule(warmup_until=1, end=10, peak=1.0, final=0.0),
        *(
            lr_schedules.wsd_schedule(warmup_until=1, decay_from=5, end=10, peak=1.0, final=0.0, decay=decay)
            for decay in ("linear", "sqrt", "cosine")
        ),
    ]

    assert [lr_at(schedule, 10) for schedule in ends] == [0.0] * 5
    assert all(lr_at(schedule, 9) > 0 for schedule in ends)
    assert lr_at(lr_schedules.inv_sqrt_schedule(warmup_until=1, end=10, peak=1.0, floor=0.0, timescale=1), 10) > 0


# Refusals


def test_an_exponential_decay_to_zero_is_refused():
    """It cannot reach 0: the annealing and the exponential wsd both say to raise min."""
    with pytest.raises(ValueError, match="min must be above 0"):
        lr_schedules.wsd_schedule(warmup_until=0, decay_from=5, end=10, peak=1.0, final=0.0, decay="exponential")
    with pytest.raises(ValueError, match="min must be above 0"):
        short_infinite(final=0.0)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (
            lambda: lr_schedules.cosine_schedule(warmup_until=11, end=10, peak=1.0, final=0.1),
            "warmup_until is an end point",
        ),
        (
            lambda: lr_schedules.linear_schedule(warmup_until=-1, end=10, peak=1.0, final=0.1),
            "warmup_until must not be negative",
        ),
        (
            lambda: lr_schedules.constant_schedule(warmup_until=11, end=10, peak=1.0),
            "must not be after the stage's end",
        ),
        (lambda: short_infinite(warmup_until=41), "warmup_until is an end point and must not be after cooldown_until"),
        (lambda: short_infinite(cooldown_until=71), "cooldown_until is .* not be after constant_until: step 71"),
        (
            lambda: short_infinite(constant_until=101),
            "constant_until is .* the stage's end: step 101 is after step 100",
        ),
        (lambda: short_infinite(cooldown_until=10), "would jump from max to constant"),
        (
            lambda: lr_schedules.wsd_schedule(
                warmup_until=9, decay_from=8, end=10, peak=1.0, final=0.1, decay="cosine"
            ),
            "warmup_until is an end point and must not be after decay_from",
        ),
        (
            lambda: lr_schedules.wsd_schedule(
                warmup_until=0, decay_from=11, end=10, peak=1.0, final=0.1, decay="cosine"
            ),
            "decay_from is an end point and must not be after the stage's end",
        ),
        (
            lambda: lr_schedules.inv_sqrt_schedule(warmup_until=11, end=10, peak=1.0, floor=0.1, timescale=1),
            "warmup_until is an end point",
        ),
        (
            lambda: lr_schedules.inv_sqrt_schedule(warmup_until=0, end=10, peak=1.0, floor=0.1, timescale=0),
            "timescale must be above 0",
        ),
    ],
)
def test_end_points_out_of_order_are_refused_by_name(build, expected):
    """The message names the key, its limit, and both steps."""
    with pytest.raises(ValueError, match=expected):
        build()


def test_a_negative_t_is_refused():
    """There is no step before the first."""
    with pytest.raises(ValueError, match="t must be >= 0, got -1"):
        lr_at(short_infinite(), -1)


# What holds for every schedule


@st.composite
def any_schedule(draw):
    """(schedule, peak, lowest LR after the warm-up, end) of any kind, with empty phases among them."""
    end = draw(st.integers(1, 300))
    points = st.floats(0, 1).map(lambda x: x * end) | st.integers(0, end).map(float)
    warm, middle, late = sorted(draw(st.lists(points, min_size=3, max_size=3)))
    warm = draw(st.sampled_from([0.0, warm]))
    late = draw(st.sampled_from([late, float(end)]))
    final, constant, peak = sorted(draw(st.lists(st.floats(1e-6, 1.0), min_size=3, max_size=3)))
    common = {"warmup_until": warm, "end": end, "peak": peak}
    kind = draw(st.sampled_from(["cosine", "linear", "constant", "infinite", "wsd", "inv_sqrt"]))
    if kind in ("cosine", "linear"):
        final = draw(st.sampled_from([0.0, final]))
        build = lr_schedules.cosine_schedule if kind == "cosine" else lr_schedules.linear_schedule
        return build(**common, final=final), peak, final, end
    if kind == "constant":
        return lr_schedules.constant_schedule(**common), peak, peak, end
    if kind == "infinite":
        middle = draw(st.sampled_from([middle, late]))
        peak = constant if warm == middle else peak
        schedule = lr_schedules.infinite_schedule(
            **(common | {"peak": peak}),
            cooldown=draw(st.sampled_from(["cosine", "inv_sqrt"])),
            cooldown_until=middle,
            constant_until=late,
            constant_lr=constant,
            final=final,
            alpha=draw(st.floats(0.01, 100)),
        )
        return schedule, peak, final, end
    if kind == "wsd":
        decay = draw(st.sampled_from(["linear", "sqrt", "exponential", "cosine"]))
        return lr_schedules.wsd_schedule(**common, decay_from=late, final=final, decay=decay), peak, final, end
    timescale = draw(st.floats(0.5, 1000))
    return lr_schedules.inv_sqrt_schedule(**common, floor=final, timescale=timescale), peak, final, end


@given(any_schedule())
def test_phases_cover_the_stage_without_gaps(case):
    """No overlap, no empty phase, from 0 to the stage's end; each starts at the LR at which the last one ended."""
    schedule, _, _, end = case

    assert schedule[0].start == 0
    assert schedule[-1].end == end
    assert all(phase.start < phase.end for phase in schedule)
    assert all(a.end == b.start and a.lr_to == b.lr_from for a, b in itertools.pairwise(schedule))


@given(any_schedule())
def test_the_lr_is_continuous_at_every_border(case):
    """Just before and just after a phase's end the LR is the one at its end, to a ten-thousandth of the peak."""
    schedule, peak, _, end = case
    long = {phase for phase in schedule if phase.end - phase.start > 1e-3 * end}
    borders = [phase.end for phase, after in itertools.pairwise(schedule) if {phase, after} <= long]
    jumps = [
        abs(lr_at(schedule, border * side) - lr_at(schedule, border))
        for border in borders
        for side in (1 - 1e-13, 1 + 1e-13)
    ]

    assert all(jump <= 1e-4 * peak for jump in jumps)


@given(any_schedule())
def test_the_lr_rises_in_the_warmup_falls_after_it_and_stays_in_bounds(case):
    """One rise, one fall, above 0 from the first step of a warm-up, between the end's LR and the peak after it."""
    schedule, peak, lowest, end = case
    values = [lr_at(schedule, t) for t in range(1, end + 1)]
    warm = [v for t, v in enumerate(values, 1) if phase_at(schedule, t) == "warmup"]
    rest = values[len(warm) :]
    slack = 1e-12 * peak

    assert all(0 < a < b for a, b in itertools.pairwise(warm))
    assert all(a >= b - slack for a, b in itertools.pairwise(rest))
    assert all(lowest - slack <= value <= peak + slack for value in rest)
    assert all(value <= peak + slack for value in values)


@given(any_schedule(), st.integers(1, 10**6))
def test_after_its_end_a_schedule_keeps_its_last_lr(case, beyond):
    """A cosine must not rise again."""
    schedule, _, _, end = case

    assert lr_at(schedule, end + beyond) == lr_at(schedule, end)
    assert phase_at(schedule, end + beyond) == phase_at(schedule, end)


@given(any_schedule())
def test_the_last_step_has_the_final_lr_exactly(case):
    """A decay or an annealing reaches its lowest LR on the last step, not one step later."""
    schedule, _, lowest, end = case
    assume(schedule[-1].name in ("decay", "anneal") and schedule[-1].shape != "inv_sqrt_tail")

    assert lr_at(schedule, end) == lowest


def test_an_exponential_ends_on_its_minimum_to_the_last_bit():
    """4e-5 (3/4)^1 is not 3e-5 in floating point: the last step uses min itself."""
    schedule = lr_schedules.wsd_schedule(
        warmup_until=0, decay_from=5, end=10, peak=4e-5, final=3e-5, decay="exponential"
    )

    assert lr_at(schedule, 10) == 3e-5


@given(any_schedule())
def test_every_step_belongs_to_the_phase_that_covers_it(case):
    """A phase covers (start, end]: the step at its end is its own, the next one the next phase's."""
    schedule, _, _, end = case
    for t in range(1, end + 1):
        covering = [phase.name for phase in schedule if phase.start < t <= phase.end]

        assert covering == [phase_at(schedule, t)]
