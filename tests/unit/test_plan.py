"""The plan: METHOD's replay table, lineage and cursors, steps and positions, faults, the fingerprint, the JSON."""

import hashlib
import json
from fractions import Fraction

import pytest

from titan_cpt.config_file import load_config
from titan_cpt.errors import ConfigError, PlanError
from titan_cpt.plan import AdamWNumbers, Inventory, Point
from titan_cpt.plan_view import lr_as_json, plan_as_json, recipe_as_json
from titan_cpt.planning import final_window, make_plan

COSINE = 'schedule = "cosine", max = 1e-3, min = 1e-4'
INFINITE = 'schedule = "infinite_cosine", max = 1e-3, constant = 5e-4, cooldown_until = 0.6, constant_until = 0.85'
SPLITS = ("pile", "split1", "split2", "split3")

SLIMPAJAMA = {
    "wikipedia": 4.00,
    "book": 4.20,
    "c4": 26.69,
    "stackexchange": 3.37,
    "github": 5.22,
    "commoncrawl": 52.09,
    "arxiv": 4.43,
}


def stage(name, dataset, budget, lr=COSINE, **more):
    """One [[stages]] table; `more` is TOML by key."""
    dataset = dataset if dataset.startswith("{") else f'"{dataset}"'
    budget = f'tokens = "{budget}"' if isinstance(budget, str) else f"steps = {budget}"
    lines = [f'name = "{name}"', f"dataset = {dataset}", budget, f"lr = {{ {lr} }}"]
    return "\n[[stages]]\n" + "\n".join(lines + [f"{key} = {value}" for key, value in more.items()]) + "\n"


def datasets(*names):
    return "".join(f'\n[datasets.{name}]\ntrain = "{name}"\nvalidation = "{name}-validation"\n' for name in names)


@pytest.fixture
def make(write):
    """make(text, *overrides, tokens={source: tokens}, world_size=1): the plan; data that is not named is not there."""

    def make(text, *overrides, tokens=None, world_size=1, vocab_size=257):
        config = load_config(write(text), overrides)
        absent = {
            source: None
            for name, dataset in config.datasets.items()
            for source in ([f"{name}.{domain}" for domain in dataset.domains] or [name])
        }
        return make_plan(config, Inventory(absent | (tokens or {}), vocab_size), world_size)

    return make


def drawn(plan, name):
    """All draws of a stage, in order."""
    stage = plan.stage(name)
    return [draw for step in range(stage.steps) for draw in plan.batch(stage, step)]


def ordinals(plan, name, source, *, replayed):
    return [draw.ordinal for draw in drawn(plan, name) if (draw.source, draw.replayed) == (source, replayed)]


# Replay: METHOD.md section 3


def splits(budgets):
    """Pile, then three splits with 5 % replay."""
    five = {"replay": "{ fraction = 0.05 }"}
    return datasets(*SPLITS[1:]) + "".join(
        stage(f"on-{name}", name, budget, **(five if i else {}))
        for i, (name, budget) in enumerate(zip(SPLITS, budgets, strict=True))
    )


def test_the_shares_are_the_papers_table_exactly(head, make):
    """Total replay 5 %, inside it each old dataset by the tokens of it trained on so far, replay included."""
    plan = make(head + splits((3000, 1000, 1000, 1000)))

    assert [dict(stage.shares) for stage in plan.stages] == [
        {"pile": 1},
        {"pile": Fraction("0.05"), "split1": Fraction("0.95")},
        {"pile": Fraction("0.038125"), "split1": Fraction("0.011875"), "split2": Fraction("0.95")},
        {
            "pile": Fraction("0.03088125"),
            "split1": Fraction("0.00961875"),
            "split2": Fraction("0.0095"),
            "split3": Fraction("0.95"),
        },
    ]


def test_the_tokens_in_the_json_are_the_papers_table(head, make):
    """300B and three times 100B in batches of 1000 x 2000: each dataset's tokens to less than two sequences."""
    text = head.replace("= 20\n", "= 1000\n").replace("= 16\n", "= 2000\n") + splits(("300B", "100B", "100B", "100B"))
    answer = plan_as_json(make(text))
    table = [
        {"pile": 300e9},
        {"pile": 5e9, "split1": 95e9},
        {"pile": 3.8125e9, "split1": 1.1875e9, "split2": 95e9},
        {"pile": 3.088125e9, "split1": 0.961875e9, "split2": 0.95e9, "split3": 95e9},
    ]

    assert [stage["steps"] for stage in answer["stages"]] == [150_000, 50_000, 50_000, 50_000]
    for expected, got in zip(table, answer["stages"], strict=True):
        assert got["datasets"].keys() == expected.keys()
        assert sum(use["tokens"] for use in got["datasets"].values()) == got["tokens"]
        assert sum(use["replayed_tokens"] for use in got["datasets"].values()) == (5e9 if len(expected) > 1 else 0)
        assert all(abs(use["tokens"] - expected[name]) < 2 * 2000 for name, use in got["datasets"].items())


def test_replay_never_adds_compute(head, make):
    """METHOD.md's example in small: 100 + 100 steps at 5 % are 95 + 5, and 200 in all."""
    text = head + stage("a", "pile", 100) + stage("b", "german", 100, replay="{ fraction = 0.05 }")
    answer = plan_as_json(make(text))
    use = answer["stages"][1]["datasets"]

    assert (use["german"]["tokens"], use["german"]["replayed_tokens"]) == (95 * 320, 0)
    assert (use["pile"]["tokens"], use["pile"]["replayed_tokens"]) == (5 * 320, 5 * 320)
    assert answer["total_tokens"] == answer["retraining_tokens"] == 200 * 320


def test_replay_draws_what_was_trained_on_first_in_that_order(two_stages, make):
    """25 % of 50 steps x 20: the first 250 sequences of the pile's 2000, as they were first seen."""
    plan = make(two_stages)

    assert ordinals(plan, "first", "pile", replayed=False) == list(range(2000))
    assert ordinals(plan, "second", "pile", replayed=True) == list(range(250))
    assert ordinals(plan, "second", "german", replayed=False) == list(range(750))


def test_the_next_replay_goes_on_where_the_last_one_ended(two_stages, make):
    """Each stage replays fresh sequences; a dataset met later is replayed from its own first one."""
    plan = make(two_stages + datasets("books") + stage("third", "books", 50, replay="{ fraction = 0.25 }"))
    pile = ordinals(plan, "third", "pile", replayed=True)
    german = ordinals(plan, "third", "german", replayed=True)

    assert pile == list(range(250, 250 + len(pile)))
    assert german == list(range(len(german)))
    assert len(pile) + len(german) == 250
    assert len(pile) == pytest.approx(250 * 2250 / 3000, abs=1)  # 2000 + 250 of 3000 sequences so far
    assert plan.stage("third").before.replayed == {"pile": 250}


def test_new_data_goes_on_where_it_was_left(head, make):
    """A dataset that comes back as new data takes up its next ordinal, whatever was replayed of it meanwhile."""
    plan = make(
        head
        + stage("a", "pile", 10)
        + stage("b", "german", 10, replay="{ fraction = 0.5 }")
        + stage("c", "pile", 5, replay="{ fraction = 0.1 }")
    )

    assert ordinals(plan, "c", "pile", replayed=False) == list(range(200, 290))
    assert ordinals(plan, "c", "german", replayed=True) == list(range(10))
    assert ordinals(plan, "c", "pile", replayed=True) == []


def test_cursors_add_up_over_all_stages(head, make):
    """Pile three times, and replayed three times: every leg goes on where the legs before it ended."""
    fifth = {"replay": '{ fraction = 0.2, from = "pile" }'}
    plan = make(
        head
        + stage("a", "pile", 10)
        + stage("b", "german", 10, **fifth)
        + stage("c", "pile", 10)
        + stage("d", "german", 10, **fifth)
        + stage("e", "pile", 5)
        + stage("f", "german", 5, **fifth)
    )

    assert [ordinals(plan, name, "pile", replayed=False)[0] for name in "ace"] == [0, 200, 400]
    assert [ordinals(plan, name, "german", replayed=False)[0] for name in "bdf"] == [0, 160, 320]
    assert ordinals(plan, "f", "pile", replayed=True) == list(range(80, 100))
    assert plan.stage("f").before.steps == 45
    assert plan.stage("f").before.exposure == {"pile": 200 + 40 + 200 + 40 + 100, "german": 160 + 160}


def test_replay_that_runs_out_is_refused(head, make):
    """10 steps were seen, 25 steps' worth would be replayed: 500 sequences of 200; all of the 200 would be fine."""
    text = head + stage("a", "pile", 10) + stage("b", "german", 50, replay="{ fraction = 0.5 }")
    with pytest.raises(PlanError) as refusal:
        make(text)

    assert "stages.b.replay: 500 sequences of 'pile' would be replayed in all, 200 were seen; " in str(refusal.value)
    assert 'set on_exhausted = "repeat"' in str(refusal.value)
    assert ordinals(make(text, ("stages.b.steps", "20")), "b", "pile", replayed=True) == list(range(200))
    with pytest.raises(PlanError, match="210 sequences of 'pile' would be replayed in all, 200 were seen"):
        make(text, ("stages.b.steps", "21"))


def test_only_what_was_seen_can_be_replayed_however_much_there_is(head, make):
    """1000 sequences lie on disk, 200 were trained on: the 201st is refused."""
    text = head + stage("a", "pile", 10) + stage("b", "german", 20, replay="{ fraction = 0.5 }")

    assert ordinals(make(text, tokens={"pile": 16_001}), "b", "pile", replayed=True) == list(range(200))
    with pytest.raises(PlanError, match="210 sequences of 'pile' would be replayed in all, 200 were seen"):
        make(text, ("stages.b.steps", "21"), tokens={"pile": 16_001})


def test_a_domain_that_was_never_drawn_cannot_be_replayed(head, make):
    """A weight of 1 in 1001 gets none of 20 sequences: not even on_exhausted = "repeat" has anything to repeat."""
    text = (
        head
        + '[datasets.web.domains]\nbig = { train = "x", weight = 1000 }\nsmall = { train = "y", weight = 1 }\n'
        + stage("a", "web", 1)
        + stage("b", "german", 100, replay='{ fraction = 0.5, on_exhausted = "repeat" }')
    )
    with pytest.raises(
        PlanError, match=r"1 sequences of 'web\.small' would be replayed in all, 0 were seen; raise its"
    ):
        make(text)


def test_replay_that_runs_out_over_two_stages_is_refused_in_the_second(head, make):
    """The cursor counts: 150 and then 150 of 200."""
    half = {"replay": '{ fraction = 0.5, from = "pile" }'}
    text = head + stage("a", "pile", 10) + stage("b", "german", 15, **half) + stage("c", "german", 15, **half)
    with pytest.raises(PlanError, match=r"stages\.c\.replay: 300 sequences of 'pile' would be replayed in all, 200"):
        make(text)


def test_replay_may_repeat_where_it_is_asked_to(head, make):
    """Then it starts over with the first sequence, and the plan says so."""
    plan = make(
        head + stage("a", "pile", 10) + stage("b", "german", 50, replay='{ fraction = 0.5, on_exhausted = "repeat" }')
    )

    assert ordinals(plan, "b", "pile", replayed=True) == [*range(200), *range(200), *range(100)]
    assert any("they repeat, as on_exhausted asks" in note for note in plan.notes)


def test_reshuffled_replay_takes_the_seen_sequences_in_another_order(head, make):
    """All 200 that were seen, each once, not as they came; another seed is another order."""
    text = head + stage("a", "pile", 10) + stage("b", "german", 20, replay='{ fraction = 0.5, order = "reshuffled" }')
    first = ordinals(make(text), "b", "pile", replayed=True)
    other = ordinals(make(text, ("job.seed", "1")), "b", "pile", replayed=True)

    assert sorted(first) == sorted(other) == list(range(200))
    assert len({tuple(order) for order in (first, other, range(200))}) == 3


def test_replay_may_name_its_datasets_and_weigh_them(head, make):
    """A list is weighed by what was seen, a table as it says."""
    old = head + datasets("books", "news") + stage("a", "pile", 30) + stage("b", "german", 10) + stage("c", "news", 10)
    by_list = make(old + stage("d", "books", 10, replay='{ fraction = 0.5, from = ["pile", "german"] }'))
    by_table = make(old + stage("d", "books", 10, replay="{ fraction = 0.5, from = { pile = 1, german = 3 } }"))
    alone = make(old + stage("d", "books", 10, replay='{ fraction = 0.5, from = "news" }'))

    assert dict(by_list.stages[3].shares) == {
        "books": Fraction(1, 2),
        "pile": Fraction(3, 8),
        "german": Fraction(1, 8),
    }
    assert dict(by_table.stages[3].shares) == {
        "books": Fraction(1, 2),
        "pile": Fraction(1, 8),
        "german": Fraction(3, 8),
    }
    assert dict(alone.stages[3].shares) == {"books": Fraction(1, 2), "news": Fraction(1, 2)}


def test_a_foreign_checkpoints_data_is_replayed_as_if_seen_once(head, make):
    """1601 tokens are 100 windows of 16 and one more token; the 101st replayed sequence is refused."""
    text = head + stage("a", "german", 10, init='"checkpoint:x"', replay='{ fraction = 0.5, from = ["pile"] }')

    assert ordinals(make(text, tokens={"pile": 1601}), "a", "pile", replayed=True) == list(range(100))
    with pytest.raises(PlanError, match="100 sequences of 'pile' would be replayed in all, 99 were seen"):
        make(text, tokens={"pile": 1600})


def test_a_reshuffled_order_is_only_known_with_its_data(head, make):
    """The plan can be made; the batch is refused until the data is there."""
    replay = '{ fraction = 0.5, from = ["pile"], order = "reshuffled" }'
    text = head + stage("a", "german", 10, init='"checkpoint:x"', replay=replay)
    plan = make(text)
    with pytest.raises(PlanError, match="reshuffled replay of 'pile' is only known with its data there"):
        plan.batch(plan.stages[0], 0)

    assert len(drawn(make(text, tokens={"pile": 1601}), "a")) == 200


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (stage("a", "pile", 10, replay="{ fraction = 0.1 }"), "stages.a.replay.from: the stage's weights were trained"),
        (
            stage("a", "pile", 10) + stage("b", "german", 10, init='"random"', replay="{ fraction = 0.1 }"),
            "stages.b.replay.from: the stage's weights were trained on nothing else yet",
        ),
        (
            stage("a", "pile", 10) + stage("b", "pile", 10, replay='{ fraction = 0.1, from = ["pile", "german"] }'),
            "stages.b.replay.from: 'german' was not trained on in this run",
        ),
        (
            stage(
                "a",
                "pile",
                10,
                'schedule = "infinite_cosine", constant = 1e-3, warmup_until = 0, cooldown_until = 0, '
                "constant_until = 0",
            )
            + stage("b", "german", 10, replay="{ fraction = 0.1 }"),
            "stages.b.replay.from: the stage's weights were trained on nothing else yet",
        ),
    ],
)
def test_replay_of_nothing_is_refused(head, make, stages, expected):
    """No earlier data in the lineage, or none whose share is known: an error that says what to name."""
    with pytest.raises(PlanError) as refusal:
        make(head + stages)

    assert f"  - {expected}" in str(refusal.value)


def test_a_replay_of_zero_is_no_replay(two_stages, make):
    """The baseline without replay by one override, even where there is nothing to replay."""
    plan = make(two_stages, ("stages.second.replay.fraction", "0"), ("stages.second.init", "random"))

    assert {draw.source for draw in drawn(plan, "second")} == {"german"}


# Lineage


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
def test_a_stage_goes_on_from_the_right_point(head, make, lr, init, steps_done):
    """After an infinite stage "previous" is its pre-anneal point; the data of the annealing is not used up by then."""
    more = {} if init is None else {"init": f'"{init}"'}
    plan = make(head + stage("a", "pile", 100, lr) + stage("b", "pile", 10, **more))
    second = plan.stage("b")

    assert second.init == Point("a", steps_done)
    assert second.before.steps == steps_done
    assert second.before.trained == {"pile": 20 * steps_done}
    assert second.before.exposure == {"pile": 20 * steps_done}
    assert plan.batch(second, 0)[0].ordinal == 20 * steps_done


def test_replay_after_an_infinite_stage_knows_only_what_was_seen_before_the_annealing(head, make):
    """85 of 100 steps: 1700 sequences can be replayed, the 1701st is refused."""
    text = head + stage("a", "pile", 100, INFINITE) + stage("b", "german", 100, replay="{ fraction = 0.85 }")

    assert ordinals(make(text), "b", "pile", replayed=True) == list(range(1700))
    with pytest.raises(PlanError, match="1720 sequences of 'pile' would be replayed in all, 1700 were seen"):
        make(text, ("stages.b.replay.fraction", "0.86"))


def test_a_branch_does_not_see_its_sisters_data(head, make):
    """Two stages from the same one both go on at its cursors; the second knows nothing of the first's data."""
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
    assert plan.stage("d").before.steps == 0
    assert ordinals(plan, "d", "pile", replayed=False) == list(range(200))


def test_no_pre_anneal_point_where_nothing_is_annealed(two_stages, make):
    """A cosine has none."""
    with pytest.raises(
        PlanError, match=r"stages\.second\.init: stage 'first' has no annealing, so no pre-anneal point"
    ):
        make(two_stages, ("stages.second.init", "stage:first@pre_anneal"))


def test_forgetting_is_counted_from_where_the_weights_left_a_dataset(head, make):
    """The first stage after the last one of the lineage in which the dataset was new; replay does not count as new."""
    five = {"replay": "{ fraction = 0.05 }"}
    plan = make(
        head
        + datasets("books")
        + stage("a", "pile", 100)
        + stage("b", "german", 100, **five)
        + stage("c", "books", 100, **five)
        + stage("d", "german", 100)
        + stage("e", "books", 100, init='"stage:b"')
        + stage("f", "books", 100, init='"checkpoint:x"')
        + stage("g", "books", 100)
    )
    since = {
        name: [plan.forgetting_since(plan.stage(name), dataset) for dataset in ("pile", "german", "books")]
        for name in "abcdefg"
    }

    assert since == {
        "a": [None, None, None],
        "b": ["b", None, None],
        "c": ["b", "c", None],
        "d": ["b", None, "d"],
        "e": ["b", "e", None],
        "f": ["f", "f", None],
        "g": ["f", "f", None],
    }
    assert plan.forgetting_since(plan.stage("c"), "german.web") == "c"


# Steps, positions, LR


PAPER = {"= 20\n": "= 1104\n", "local_batch_size = 2": "local_batch_size = 4", "= 16\n": "= 2048\n"}


def paper_batch(head):
    for old, new in PAPER.items():
        head = head.replace(old, new)
    return head


@pytest.mark.parametrize(("tokens", "steps"), [("100B", 44_229), ("300B", 132_686), ("2_260_992", 1), ("2_260_993", 2)])
def test_tokens_are_rounded_up_to_whole_steps(head, make, tokens, steps):
    """Batches of 1104 x 2048 = 2,260,992 tokens; an exact multiple is not rounded."""
    plan = make(paper_batch(head) + stage("a", "pile", tokens))

    assert plan.step_tokens == 2_260_992
    assert plan.stages[0].steps == steps


@pytest.mark.parametrize(
    ("position", "end"),
    [("0.29", 29.0), ("0.57", 57.0), ("0.07", 7.0), ("29", 29.0), ('"9280"', 29.0), ('"9.28K"', 29.0), ("0.285", 28.5)],
)
def test_end_points_are_exact(head, make, position, end):
    """0.29 x 100 is step 29, not 28.999...; tokens count in steps of 320; a share may fall between steps."""
    plan = make(head + stage("a", "pile", 100, f"{COSINE}, warmup_until = {position}"))

    assert plan.stages[0].schedule[0].end == end


def test_step_s_runs_at_eta_of_s_plus_one(head, make):
    """No step at LR 0: with four steps of warm-up the first runs at a quarter of max, the last at min."""
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
def test_every_schedule_starts_peaks_and_ends_where_its_keys_say(head, make, lr, start, peak, final):
    """Start, peak and end in the JSON, by hand; a left-out min is a tenth of max, or of constant without one."""
    (answer,) = plan_as_json(make(head + stage("a", "pile", 100, lr)))["stages"]

    assert answer["start_lr"] == pytest.approx(start, rel=1e-12)
    assert answer["peak_lr"] == pytest.approx(peak, rel=0.01)  # between two steps where the warm-up ends there
    assert answer["final_lr"] == pytest.approx(final, rel=1e-12)


def test_the_papers_schedule_through_the_plan(head, make):
    """METHOD.md section 2 from the TOML on: 132,366 steps, 0.01 / 0.60 / 0.85, both cool-downs and the plain cosine."""
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


def test_the_optimizers_numbers_can_change_in_a_stage(two_stages, make):
    """What [stages.optimizer] leaves out stays as [optimizer] has it; "keep" keeps."""
    plan = make(
        two_stages,
        ("optimizer.eps", "1e-6"),
        ("stages.second.optimizer.beta2", "0.99"),
        ("stages.second.optimizer.weight_decay", "0"),
        ("stages.second.optimizer_state", "keep"),
    )

    assert [stage.optimizer for stage in plan.stages] == [
        AdamWNumbers((0.9, 0.95), 1e-6, 0.1),
        AdamWNumbers((0.9, 0.99), 1e-6, 0.0),
    ]
    assert [stage.keep_optimizer for stage in plan.stages] == [False, True]


def test_the_final_window_is_the_papers():
    """The last 100 iterations sampled every 10: ten samples, the last step among them; never before the first step."""
    assert final_window(1000, 100, 10) == (910, 920, 930, 940, 950, 960, 970, 980, 990, 1000)
    assert final_window(25, 100, 10) == (5, 15, 25)
    assert final_window(20, 100, 10) == (10, 20)
    assert final_window(1000, 1, 10) == (1000,)
    assert final_window(1000, 0, 10) == ()


def test_the_final_window_follows_the_config(one_stage, make):
    """Off by default; validation.final_window_steps and _every put it on."""
    asked = make(one_stage, ("validation.final_window_steps", "50"), ("validation.final_window_every", "25"))

    assert make(one_stage).stages[0].final_window == ()
    assert asked.stages[0].final_window == (75, 100)


# Ranks


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 10), (2, 5), (5, 2), (10, 1)])
def test_the_batches_do_not_depend_on_the_ranks(two_stages, make, world_size, accumulation):
    """The same global batches, LRs and fingerprint on 1, 2, 5 and 10 ranks; only the accumulation follows."""
    alone, plan = make(two_stages), make(two_stages, world_size=world_size)

    assert (plan.data_parallel, plan.accumulation) == (world_size, accumulation)
    assert plan.fingerprint == alone.fingerprint
    assert plan.stages == alone.stages
    assert drawn(plan, "second") == drawn(alone, "second")


@pytest.mark.parametrize("world_size", [3, 4, 20])
def test_a_batch_that_does_not_divide_over_the_ranks_is_refused(one_stage, make, world_size):
    """20 sequences over 3, 4 or 20 ranks of 2: never a remainder that is dropped."""
    with pytest.raises(PlanError, match=f"20 sequences do not divide into {2 * world_size} a micro-step"):
        make(one_stage, world_size=world_size)


def test_a_shard_degree_must_be_the_ranks_there_are(one_stage, make):
    """On five ranks only 5; the message says so."""
    with pytest.raises(PlanError, match=r"data_parallel_shard_degree: must be 5 on 5 ranks, or left out, got 2"):
        make(one_stage, ("parallelism.data_parallel_shard_degree", "2"), world_size=5)

    assert make(one_stage, ("parallelism.data_parallel_shard_degree", "5"), world_size=5).data_parallel == 5


def test_all_faults_of_a_plan_are_told_at_once(two_stages, make):
    """The batch, the schedule, the replay, the data: one refusal."""
    with pytest.raises(PlanError) as refusal:
        make(
            two_stages,
            ("stages.first.lr.warmup_until", "101"),
            ("stages.second.replay.from", '["german", "pile"]'),
            tokens={"german": 16},
            world_size=3,
        )
    head, *faults = str(refusal.value).splitlines()

    assert head == "4 problems in the plan of 'tested':"
    assert [fault.split(":")[0] for fault in faults] == [
        "  - training.global_batch_size",
        "  - datasets.german.train",
        "  - stages.first.lr",
        "  - stages.second.replay.from",
    ]


# Data


def test_epochs_are_told_where_the_data_is_there(two_stages, make):
    """40,000 pile tokens: 32,000 are 0.8 epochs; replay counts towards epochs too; absent data has none and a note."""
    plan = make(two_stages, tokens={"pile": 40_000})
    first, second = (stage["datasets"] for stage in plan_as_json(plan)["stages"])

    assert first["pile"] == {"tokens": 32_000, "replayed_tokens": 0, "epochs": 0.8}
    assert second["pile"] == {"tokens": 4000, "replayed_tokens": 4000, "epochs": 0.1}
    assert second["german"] == {"tokens": 12_000, "replayed_tokens": 0, "epochs": None}
    assert any(note.startswith("data not there yet: german;") for note in plan.notes)
    assert plan.sequences == {"pile": 2499, "german": None}


def test_a_source_shorter_than_a_sequence_is_refused(one_stage, make):
    """A window is seq_len + 1 tokens: 17 are one sequence, 16 are none."""
    with pytest.raises(PlanError, match=r"datasets\.pile\.train: 16 tokens are fewer than one sequence of 16 \+ 1"):
        make(one_stage, tokens={"pile": 16})

    assert make(one_stage, tokens={"pile": 17}).sequences["pile"] == 1


@pytest.fixture
def domains(head):
    """The seven domains of SlimPajama, with their weights."""
    return head + "".join(
        f'[datasets.slim.domains.{name}]\ntrain = "{name}"\nweight = {weight}\n' for name, weight in SLIMPAJAMA.items()
    )


def test_domains_have_their_weights_to_less_than_two_sequences(domains, make):
    """SlimPajama's seven add up to 100 %: of 10,000 sequences each gets its hundredths, the sum is the dataset's."""
    (answer,) = plan_as_json(make(domains + stage("a", "slim", 500)))["stages"]
    got = {name: use["tokens"] / 16 for name, use in answer["domains"].items()}

    assert got.keys() == {f"slim.{name}" for name in SLIMPAJAMA}
    assert all(abs(got[f"slim.{name}"] - 100 * weight) < 2 for name, weight in SLIMPAJAMA.items())
    assert sum(got.values()) * 16 == answer["datasets"]["slim"]["tokens"] == answer["tokens"]


def test_domains_are_replayed_by_their_weights_from_their_own_cursors(domains, make):
    """10 % of 1000 sequences: 52 of CommonCrawl, its first ones in order; epochs only where all domains are there."""
    text = domains + stage("a", "slim", 500) + stage("b", "german", 50, replay="{ fraction = 0.1 }")
    tokens = {f"slim.{name}": 16_001 for name in SLIMPAJAMA}
    plan = make(text, tokens=tokens)
    crawl = ordinals(plan, "b", "slim.commoncrawl", replayed=True)

    assert crawl == list(range(len(crawl)))
    assert abs(len(crawl) - 52.09) < 2
    assert plan_as_json(plan)["stages"][1]["datasets"]["slim"]["tokens"] == 100 * 16
    assert plan.stages[0].use["slim"].epochs == pytest.approx(10_000 / 7000, rel=1e-3)
    assert make(text, tokens=tokens | {"slim.book": None}).stages[0].use["slim"].epochs is None


def test_the_union_baseline_mixes_as_it_says(head, make):
    """{ pile = 0.5, german = 0.5 }: half and half in every prefix; 3 and 1 are relative."""
    half = make(head + stage("a", "{ pile = 0.5, german = 0.5 }", 10))
    more = make(head + stage("a", "{ german = 1, pile = 3 }", 10))

    assert {sum(draw.source == "pile" for draw in drawn(half, "a")[i : i + 2]) for i in range(0, 200, 2)} == {1}
    assert dict(more.stages[0].shares) == {"pile": Fraction(3, 4), "german": Fraction(1, 4)}
    assert {draw.replayed for draw in drawn(half, "a")} == {False}


def test_a_dataset_without_validation_is_noted(one_stage, make):
    """Its forgetting will not be measured; nobody should find that out afterwards."""
    bare = one_stage.replace('validation = "data/pile-validation"\n', "")

    assert any("datasets.pile: has no validation tokens" in note for note in make(bare).notes)
    assert not any("validation" in note for note in make(one_stage).notes)


# The fingerprint


RECIPE = {  # of `one_stage`, written by hand
    "model.family": "gpt_neox",
    "model.layers": 2,
    "model.width": 64,
    "model.heads": 2,
    "model.mlp_width": 256,
    "model.vocab_size": 384,
    "model.rotary_fraction": 0.25,
    "model.rope_base": 10_000.0,
    "model.norm_eps": 1e-5,
    "model.parallel_residual": True,
    "job.seed": 0,
    "training.global_batch_size": 20,
    "training.seq_len": 16,
    "training.max_norm": 1.0,
    "training.mixed_precision_param": "bfloat16",
    "stages": ["first"],
    "stages.first.steps": 100,
    "stages.first.dataset": {"pile": "1"},
    "stages.first.domain_weights": {},
    "stages.first.init": "random",
    "stages.first.optimizer_state": "reset",
    "stages.first.optimizer.beta1": 0.9,
    "stages.first.optimizer.beta2": 0.95,
    "stages.first.optimizer.eps": 1e-8,
    "stages.first.optimizer.weight_decay": 0.1,
    "stages.first.lr.schedule": "cosine",
    "stages.first.lr.max": 1e-3,
    "stages.first.lr.min": 1e-4,
    "stages.first.lr.warmup_until": "1",
    "stages.first.replay.fraction": 0.0,
    "stages.first.replay.from": [],
    "stages.first.replay.order": "as_trained",
}


def test_the_fingerprint_is_the_hash_of_the_recipe(one_stage, make):
    """Eight digits of SHA-256 over these keys: renaming one, or adding one, would orphan every checkpoint there is."""
    plan = make(one_stage)
    text = json.dumps(dict(sorted(RECIPE.items())))

    assert plan.recipe_until(0) == RECIPE
    assert plan.fingerprint == hashlib.sha256(text.encode()).hexdigest()[:8]


RICH = (
    stage("a", "pile", 100, INFINITE)
    + '\n[datasets.web.domains.one]\ntrain = "x"\nweight = 1\n[datasets.web.domains.two]\ntrain = "y"\nweight = 3\n'
    + stage(
        "b",
        "web",
        50,
        'schedule = "wsd", max = 1e-3, min = 1e-4, decay_from = 0.8, decay = "sqrt"',
        replay='{ fraction = 0.25, from = ["pile"] }',
    )
)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("job.seed", "1"),
        ("model.layers", "3"),
        ("model.width", "128"),
        ("model.heads", "4"),
        ("model.mlp_width", "512"),
        ("model.vocab_size", "512"),
        ("model.rotary_fraction", "0.5"),
        ("model.rope_base", "50000"),
        ("model.norm_eps", "1e-6"),
        ("model.parallel_residual", "false"),
        ("training.global_batch_size", "40"),
        ("training.seq_len", "32"),
        ("training.max_norm", "2.0"),
        ("training.mixed_precision_param", "float32"),
        ("optimizer.beta1", "0.8"),
        ("optimizer.eps", "1e-6"),
        ("stages.a.steps", "110"),
        ("stages.a.dataset", "german"),
        ("stages.a.name", "z"),
        ("stages.a.lr.max", "2e-3"),
        ("stages.a.lr.constant", "4e-4"),
        ("stages.a.lr.min", "2e-5"),
        ("stages.a.lr.warmup_until", "0.02"),
        ("stages.a.lr.cooldown_until", "0.5"),
        ("stages.a.lr.constant_until", "0.9"),
        ("stages.a.lr.schedule", "infinite_inv_sqrt"),
        ("stages.b.lr.decay_from", "0.9"),
        ("stages.b.lr.decay", "linear"),
        ("stages.b.init", "stage:a"),
        ("stages.b.optimizer_state", "keep"),
        ("stages.b.optimizer.beta2", "0.99"),
        ("stages.b.optimizer.weight_decay", "0"),
        ("stages.b.replay.fraction", "0.2"),
        ("stages.b.replay.from", "german"),
        ("stages.b.replay.order", "reshuffled"),
        ("stages.b.dataset", "{ web = 1, german = 1 }"),
        ("datasets.web.domains.one.weight", "2"),
    ],
)
def test_the_fingerprint_changes_with_what_changes_the_run(head, make, key, value):
    """Every number that the weights depend on."""
    assert make(head + RICH, (key, value)).fingerprint != make(head + RICH).fingerprint


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("job.name", "other"),
        ("job.description", "words"),
        ("job.output_dir", "elsewhere"),
        ("datasets.pile.train", "elsewhere/pile"),
        ("datasets.pile.validation", "elsewhere"),
        ("datasets.web.domains.one.train", "elsewhere"),
        ("training.local_batch_size", "5"),
        ("training.num_workers", "2"),
        ("training.gc_freq", "7"),
        ("parallelism.data_parallel_shard_degree", "1"),
        ("checkpoint.interval", "7"),
        ("checkpoint.keep_latest_k", "7"),
        ("validation.interval", "7"),
        ("validation.final_window_steps", "7"),
        ("metrics.log_freq", "1"),
        ("stages.a.lr.warmup_until", "1"),
        ("stages.a.lr.cooldown_until", '"19_200"'),
        ("stages.a.lr.min", "1e-4"),
        ("stages.b.init", "stage:a@pre_anneal"),
        ("stages.b.replay.on_exhausted", "repeat"),
        ("stages.b.dataset", "{ web = 7 }"),
    ],
)
def test_the_fingerprint_ignores_what_does_not_change_the_run(head, make, key, value):
    """Layout, intervals, paths, names, and the same number written in another way."""
    plain, other = make(head + RICH), make(head + RICH, (key, value))

    assert other.fingerprint == plain.fingerprint
    assert drawn(other, "b") == drawn(plain, "b")


def test_the_order_of_keys_changes_nothing(head, make):
    """Datasets, weights and tables listed the other way round: the same fingerprint and the same draws."""
    one = (
        head
        + datasets("x", "y")
        + stage("a", "{ x = 1, y = 1, pile = 1 }", 10)
        + stage("b", "german", 10, replay="{ fraction = 0.5, from = { x = 1, y = 1 } }")
    )
    other = (
        head
        + datasets("y", "x")
        + stage("a", "{ pile = 1, y = 1, x = 1 }", 10)
        + stage("b", "german", 10, replay="{ from = { y = 1, x = 1 }, fraction = 0.5 }")
    )

    assert make(one).fingerprint == make(other).fingerprint
    assert drawn(make(one), "a") == drawn(make(other), "a")
    assert drawn(make(one), "b") == drawn(make(other), "b")


def test_an_appended_stage_leaves_the_past_as_it_was(two_stages, make):
    """recipe_until of what is done is the same with and without a third stage, and so are its batches."""
    short = make(two_stages)
    long = make(two_stages + stage("third", "pile", 10))

    assert long.recipe_until(1) == short.recipe_until(1)
    assert long.recipe_until(0) == short.recipe_until(0)
    assert long.fingerprint != short.fingerprint
    assert drawn(long, "second") == drawn(short, "second")


# What is shown


def test_the_json_has_what_is_promised(two_stages, make):
    """Every key of DESIGN.md section 3b, and sums that hold."""
    answer = json.loads(json.dumps(plan_as_json(make(two_stages))))

    assert {"fingerprint", "model", "stages", "total_tokens", "retraining_tokens"} <= answer.keys()
    assert {"family", "parameters", "parameters_without_embeddings"} <= answer["model"].keys()
    for stage in answer["stages"]:
        assert {"name", "steps", "tokens", "start_lr", "peak_lr", "final_lr", "flops", "datasets"} <= stage.keys()
        assert stage["tokens"] == stage["steps"] * 320
        assert sum(use["tokens"] for use in stage["datasets"].values()) == stage["tokens"]
        assert all(use.keys() == {"tokens", "replayed_tokens", "epochs"} for use in stage["datasets"].values())
    assert answer["total_tokens"] == answer["retraining_tokens"] == 150 * 320
    assert [stage["union_tokens"] for stage in answer["stages"]] == [100 * 320, 150 * 320]
    assert answer["accumulation"] * answer["world_size"] * 2 * 16 == answer["step_tokens"] == 320


@pytest.mark.parametrize(("size", "parameters"), [("405m", 405_334_016), ("10b", 9_642_249_216)])
def test_the_papers_models_have_the_papers_parameters(one_stage, make, size, parameters):
    """METHOD.md section 4, embeddings included, also where the tokenizer is not there yet."""
    answer = plan_as_json(make(one_stage, ("model.size", size), vocab_size=None))

    assert answer["model"]["parameters"] == parameters
    assert any("tokenizer not there yet" in note for note in answer["notes"])


def test_flops_are_counted_per_token(one_stage, make):
    """debug with 257 ids, length 16: 6 x 124,672 parameters that multiply + 12 x 2 x 64 x 16, for 32,000 tokens."""
    (answer,) = plan_as_json(make(one_stage))["stages"]

    assert answer["flops"] == (6 * 124_672 + 12 * 2 * 64 * 16) * 32_000


def test_the_recipe_of_a_batch_is_its_draws(two_stages, make):
    """[[source, ordinal], ...] in batch order: a quarter of the 20 replayed, the first at the second place."""
    plan = make(two_stages)
    batches = [recipe_as_json(plan, "second", str(step)) for step in range(2)]

    assert batches[0][:4] == [("german", 0), ("pile", 0), ("german", 1), ("german", 2)]
    assert batches[1][0] == ("german", 15)
    assert [len(batch) for batch in batches] == [20, 20]


@pytest.mark.parametrize(
    ("stage_name", "step", "expected"),
    [
        ("third", "0", "there is no stage 'third'; stages are 'first', 'second'"),
        ("second", "50", "stages.second: has steps 0 to 49, got 50"),
        ("second", "-1", "a 0-based step is a whole number, got '-1'"),
        ("second", "1.5", "a 0-based step is a whole number, got '1.5'"),
    ],
)
def test_a_batch_that_is_not_there_is_refused(two_stages, make, stage_name, step, expected):
    """Unknown stages and steps past the end."""
    with pytest.raises(PlanError) as refusal:
        recipe_as_json(make(two_stages), stage_name, step)

    assert expected in str(refusal.value)


def test_a_model_that_cannot_be_is_refused(one_stage, make):
    """Too few rows for the tokenizer, or a size that nobody named."""
    with pytest.raises(ConfigError, match=r"model\.vocab_size: must hold the tokenizer's 257 tokens"):
        make(one_stage, ("model.vocab_size", "256"))
    with pytest.raises(ConfigError, match=r"model\.size: unknown size 'debgu'; did you mean 'debug'"):
        make(one_stage, ("model.size", "debgu"))


def test_run_steps_and_disk_are_counted_over_the_stages(head, make):
    """100 steps before the second stage; ends, one pre-anneal point, two kept and one being written are six."""
    plan = make(head + stage("a", "pile", 100, INFINITE) + stage("b", "german", 50))

    assert [plan.steps_before(stage) for stage in plan.stages] == [0, 100]
    assert plan.disk_bytes(2) == 6 * plan.shape.parameters * 12


def test_a_plan_for_trillions_of_tokens_answers_at_once(head, make):
    """The last batch of a 10^13-token stage is found without walking there: fresh ordinals, replay in proportion."""
    text = paper_batch(head) + stage("a", "pile", "10T") + stage("b", "german", "10T", replay="{ fraction = 0.05 }")
    plan = make(text)
    last = plan.batch(plan.stage("b"), plan.stage("b").steps - 1)
    sequences = plan.stage("b").steps * 1104

    assert len(last) == 1104
    assert max(draw.ordinal for draw in last if draw.replayed) == pytest.approx(sequences * 0.05, abs=2)
    assert max(draw.ordinal for draw in last if not draw.replayed) == pytest.approx(sequences * 0.95, abs=2)
