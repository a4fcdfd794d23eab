"""The plan's replay, lineage and cursors: METHOD's table, what may be replayed, where a stage goes on."""

import time
from fractions import Fraction

import pytest
from plans import COSINE, INFINITE, SPLITS, datasets, drawn, ordinals, stage

from titan_cpt.errors import PlanError
from titan_cpt.planning.plan import StageCheckpoint
from titan_cpt.planning.plan_json import plan_as_json


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
    assert plan.stage("third").history.replayed == {"pile": 250}


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
    assert plan.stage("f").history.steps == 45
    assert plan.stage("f").history.exposure == {"pile": 200 + 40 + 200 + 40 + 100, "german": 160 + 160}


def test_replay_that_runs_out_is_refused(head, make):
    """10 steps were seen, 25 steps' worth would be replayed: 500 sequences of 200; all of the 200 would be fine."""
    text = head + stage("a", "pile", 10) + stage("b", "german", 50, replay="{ fraction = 0.5 }")
    with pytest.raises(PlanError) as refusal:
        make(text)

    assert "stages.b.replay: 500 sequences of 'pile' would be replayed in total, and 200 were trained on; " in str(
        refusal.value
    )
    assert 'set on_exhausted = "repeat"' in str(refusal.value)
    assert ordinals(make(text, ("stages.b.steps", "20")), "b", "pile", replayed=True) == list(range(200))
    with pytest.raises(PlanError, match="210 sequences of 'pile' would be replayed in total, and 200 were trained on"):
        make(text, ("stages.b.steps", "21"))


def test_only_what_was_seen_can_be_replayed_however_much_there_is(head, make):
    """1000 sequences lie on disk, 200 were trained on: the 201st is refused."""
    text = head + stage("a", "pile", 10) + stage("b", "german", 20, replay="{ fraction = 0.5 }")

    assert ordinals(make(text, tokens={"pile": 16_001}), "b", "pile", replayed=True) == list(range(200))
    with pytest.raises(PlanError, match="210 sequences of 'pile' would be replayed in total, and 200 were trained on"):
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
        PlanError, match=r"1 sequences of 'web\.small' would be replayed in total, and 0 were trained on; raise its"
    ):
        make(text)


def test_replay_that_runs_out_over_two_stages_is_refused_in_the_second(head, make):
    """The cursor counts: 150 and then 150 of 200."""
    half = {"replay": '{ fraction = 0.5, from = "pile" }'}
    text = head + stage("a", "pile", 10) + stage("b", "german", 15, **half) + stage("c", "german", 15, **half)
    with pytest.raises(
        PlanError, match=r"stages\.c\.replay: 300 sequences of 'pile' would be replayed in total, and 200"
    ):
        make(text)


def test_replay_may_repeat_where_it_is_asked_to(head, make):
    """Then it starts over with the first sequence, and the plan says so."""
    plan = make(
        head + stage("a", "pile", 10) + stage("b", "german", 50, replay='{ fraction = 0.5, on_exhausted = "repeat" }')
    )

    assert ordinals(plan, "b", "pile", replayed=True) == [*range(200), *range(200), *range(100)]
    assert any('they repeat (on_exhausted = "repeat")' in note for note in plan.notes)


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


def in_turn(head, count, names, **more):
    """Stages of 30 + i steps on the datasets in turn, each with the default replay of a tenth."""
    replay = {"replay": '{ fraction = 0.1, on_exhausted = "repeat" }'}
    stages = (stage(f"s{i}", names[i % len(names)], 30 + i, **(replay if i else {})) for i in range(count))
    return head + datasets(*names[2:]) + "".join(stages)


def test_datasets_that_recur_are_replayed_by_their_exact_shares(head, make):
    """Thirteen stages on three datasets in turn, the shares worked out here in exact fractions of 2,000 digits.

    Every dataset's count is off by less than two sequences in every stage, and its cursor by less than two a stage.
    """
    names = ["pile", "german", "x"]
    plan = make(in_turn(head, 13, names))
    seen = dict.fromkeys(names, Fraction(0))
    for i, each in enumerate(plan.stages):
        new, items = names[i % 3], 20 * (30 + i)
        old = {name: count for name, count in seen.items() if name != new and count}
        exact = {name: Fraction(1, 10) * items * count / sum(old.values()) for name, count in old.items()}
        exact[new] = items - sum(exact.values())
        assert {name: use.tokens // 16 for name, use in each.use_by_dataset.items()} == pytest.approx(exact, abs=2)
        for name, count in exact.items():
            seen[name] += count
        if i < 8:
            assert {name: share * items for name, share in each.shares.items()} == exact
    assert seen["x"].denominator > 2**4000, "exact fractions double their digits"


def test_two_hundred_stages_on_fifty_recurring_datasets_are_planned_in_two_seconds(head, make):
    """Of this process's time; every stage's sequences are shared out among all datasets so far."""
    names = ["pile", "german", *(f"d{i}" for i in range(48))]
    text = in_turn(head, 200, names)
    began = time.process_time()
    plan = make(text)
    taken = time.process_time() - began

    assert taken < 2 + 1  # a second for reading 200 stages of TOML, and a loaded machine
    last = plan.stages[-1]
    assert len(last.use_by_dataset) == 50
    assert sum(last.shares.values()) == 1
    assert sum(use.tokens for use in last.use_by_dataset.values()) == 229 * 20 * 16
    trained = 20 * sum(30 + i for i in range(199))
    assert abs(sum(last.history.exposure.values()) - trained) < Fraction(1, 2**400)


def test_a_foreign_checkpoints_data_is_replayed_as_if_seen_once(head, make):
    """1601 tokens are 100 windows of 16 and one more token; the 101st replayed sequence is refused."""
    text = head + stage("a", "german", 10, init='"checkpoint:x"', replay='{ fraction = 0.5, from = ["pile"] }')

    assert ordinals(make(text, tokens={"pile": 1601}), "a", "pile", replayed=True) == list(range(100))
    with pytest.raises(PlanError, match="100 sequences of 'pile' would be replayed in total, and 99 were trained on"):
        make(text, tokens={"pile": 1600})


def test_a_reshuffled_order_is_only_known_with_its_data(head, make):
    """The plan can be made; the batch is refused until the data is there."""
    replay = '{ fraction = 0.5, from = ["pile"], order = "reshuffled" }'
    text = head + stage("a", "german", 10, init='"checkpoint:x"', replay=replay)
    plan = make(text)
    with pytest.raises(PlanError, match="the order of reshuffled replay of 'pile' depends on the size of its data"):
        plan.batch(plan.stages[0], 0)

    assert len(drawn(make(text, tokens={"pile": 1601}), "a")) == 200


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (
            stage("a", "pile", 10, replay="{ fraction = 0.1 }"),
            "stages.a.replay.from: these weights have not been trained",
        ),
        (
            stage("a", "pile", 10) + stage("b", "german", 10, init='"random"', replay="{ fraction = 0.1 }"),
            "stages.b.replay.from: these weights have not been trained on other data yet",
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
            "stages.b.replay.from: these weights have not been trained on other data yet",
        ),
    ],
)
def test_replay_of_nothing_is_refused(head, make, stages, expected):
    """No earlier data in the lineage, or none whose share is known: an error that says what to name."""
    with pytest.raises(PlanError) as refusal:
        make(head + stages)

    assert f"  - {expected}" in str(refusal.value)


def test_data_of_a_later_stage_cannot_be_replayed(head, make):
    """Weights from random have not seen it, whatever form `from` has; weights from elsewhere may have."""
    later = stage("c", "books", 10)
    for asked in ('["books"]', '"books"', "{ books = 1, pile = 1 }", '["pile", "books"]'):
        replay = f"{{ fraction = 0.1, from = {asked} }}"
        text = head + datasets("books") + stage("a", "pile", 10) + stage("b", "german", 10, replay=replay) + later
        with pytest.raises(PlanError, match=r"stages\.b\.replay\.from: 'books' was not seen before this stage: .* 'c'"):
            make(text)
    foreign = stage("a", "pile", 10, init='"checkpoint:x"') + stage(
        "b", "german", 10, replay='{ fraction = 0.1, from = "books" }'
    )

    assert "books" in make(head + datasets("books") + foreign + later).stage("b").shares


def test_replay_of_data_that_is_never_trained_on_is_noted(head, make):
    """It is new data under the name of replay; a dataset that is part of the stage is no such case."""
    text = head + datasets("books") + stage("a", "pile", 10)
    notes = make(text + stage("b", "german", 10, replay='{ fraction = 0.1, from = "books" }')).notes
    own = make(text + stage("b", "pile", 10, replay='{ fraction = 0.1, from = "pile" }')).notes

    assert "stages.b.replay.from: 'books' was never trained on by these weights: it is new data, not replay" in notes
    assert not any("never trained on" in note for note in own)


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

    assert second.init == StageCheckpoint("a", steps_done)
    assert second.history.steps == steps_done
    assert second.history.trained == {"pile": 20 * steps_done}
    assert second.history.exposure == {"pile": 20 * steps_done}
    assert plan.batch(second, 0)[0].ordinal == 20 * steps_done


def test_replay_after_an_infinite_stage_knows_only_what_was_seen_before_the_annealing(head, make):
    """85 of 100 steps: 1700 sequences can be replayed, the 1701st is refused."""
    text = head + stage("a", "pile", 100, INFINITE) + stage("b", "german", 100, replay="{ fraction = 0.85 }")

    assert ordinals(make(text), "b", "pile", replayed=True) == list(range(1700))
    with pytest.raises(
        PlanError, match="1720 sequences of 'pile' would be replayed in total, and 1700 were trained on"
    ):
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
    assert plan.stage("d").history.steps == 0
    assert ordinals(plan, "d", "pile", replayed=False) == list(range(200))


def test_no_pre_anneal_point_where_nothing_is_annealed(two_stages, make):
    """A cosine has none."""
    with pytest.raises(
        PlanError,
        match=r"stages\.second\.init: stage 'first' has no annealing, so no pre-anneal point: write stage:first for",
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
