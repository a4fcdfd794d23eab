"""Replay: shares as in the paper, order, cursors over stages, and what cannot be replayed."""

import time
from fractions import Fraction

import pytest
from plans import INFINITE, SLIMPAJAMA, SPLITS, datasets, drawn, ordinals, stage

from titan_cpt.errors import PlanError
from titan_cpt.planning.plan_json import plan_as_json


def splits(budgets):
    """Pile, then three splits with 5 % replay."""
    five = {"replay": "{ fraction = 0.05 }"}
    return datasets(*SPLITS[1:]) + "".join(
        stage(f"on-{name}", name, budget, **(five if i else {}))
        for i, (name, budget) in enumerate(zip(SPLITS, budgets, strict=True))
    )


def test_the_shares_are_exactly_those_of_the_paper(head, make):
    """5 % replay in total, divided among old datasets by the tokens trained on so far, replay included."""
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


def test_the_tokens_in_the_json_are_those_of_the_paper(head, make):
    """300B and three times 100B tokens in batches of 1000 x 2000: exact to less than two sequences."""
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
    """Two stages of 100 steps, the second with 5 % replay: 95 + 5 steps of data, and 200 steps in total."""
    text = head + stage("a", "pile", 100) + stage("b", "german", 100, replay="{ fraction = 0.05 }")
    answer = plan_as_json(make(text))
    use = answer["stages"][1]["datasets"]

    assert (use["german"]["tokens"], use["german"]["replayed_tokens"]) == (95 * 320, 0)
    assert (use["pile"]["tokens"], use["pile"]["replayed_tokens"]) == (5 * 320, 5 * 320)
    assert answer["total_tokens"] == answer["retraining_tokens"] == 200 * 320


def test_replay_draws_sequences_in_the_order_they_were_trained_on(two_stages, make):
    """25 % of 50 steps x 20: the first 250 of the pile's 2000 sequences."""
    plan = make(two_stages)

    assert ordinals(plan, "first", "pile", replayed=False) == list(range(2000))
    assert ordinals(plan, "second", "pile", replayed=True) == list(range(250))
    assert ordinals(plan, "second", "german", replayed=False) == list(range(750))


def test_replay_continues_where_the_last_stage_ended_it(two_stages, make):
    """Each stage replays other sequences; a dataset replayed for the first time starts with its first sequence."""
    plan = make(two_stages + datasets("books") + stage("third", "books", 50, replay="{ fraction = 0.25 }"))
    pile = ordinals(plan, "third", "pile", replayed=True)
    german = ordinals(plan, "third", "german", replayed=True)

    assert pile == list(range(250, 250 + len(pile)))
    assert german == list(range(len(german)))
    assert len(pile) + len(german) == 250
    assert len(pile) == pytest.approx(250 * 2250 / 3000, abs=1)  # 2000 + 250 of 3000 sequences so far
    assert plan.stage("third").history.replayed == {"pile": 250 * 16}


def test_new_data_continues_where_an_earlier_stage_ended(head, make):
    """A dataset that is new data again draws its next ordinals, whatever was replayed of it in between."""
    plan = make(
        head
        + stage("a", "pile", 10)
        + stage("b", "german", 10, replay="{ fraction = 0.5 }")
        + stage("c", "pile", 5, replay="{ fraction = 0.1 }")
    )

    assert ordinals(plan, "c", "pile", replayed=False) == list(range(200, 290))
    assert ordinals(plan, "c", "german", replayed=True) == list(range(10))
    assert ordinals(plan, "c", "pile", replayed=True) == []


def test_positions_add_up_over_all_stages(head, make):
    """Pile three times as new data and three times as replay: every stage continues where the last one ended."""
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


def test_replay_of_more_than_was_trained_on_is_refused(head, make):
    """200 sequences were trained on; 25 steps' worth of replay are 500. Exactly 200 are allowed."""
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


def test_only_trained_sequences_can_be_replayed(head, make):
    """The file has 1000 sequences, 200 were trained on: the 201st is refused."""
    text = head + stage("a", "pile", 10) + stage("b", "german", 20, replay="{ fraction = 0.5 }")

    assert ordinals(make(text, tokens={"pile": 16_001}), "b", "pile", replayed=True) == list(range(200))
    with pytest.raises(PlanError, match="210 sequences of 'pile' would be replayed in total, and 200 were trained on"):
        make(text, ("stages.b.steps", "21"), tokens={"pile": 16_001})


def test_a_domain_that_was_never_drawn_cannot_be_replayed(head, make):
    """A weight of 1 in 1001 gets none of 20 sequences: even on_exhausted = "repeat" has nothing to repeat."""
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
    """150 of 200 sequences, and then 150 more."""
    half = {"replay": '{ fraction = 0.5, from = "pile" }'}
    text = head + stage("a", "pile", 10) + stage("b", "german", 15, **half) + stage("c", "german", 15, **half)
    with pytest.raises(
        PlanError, match=r"stages\.c\.replay: 300 sequences of 'pile' would be replayed in total, and 200"
    ):
        make(text)


def test_replay_repeats_with_on_exhausted_repeat(head, make):
    """It starts again with the first sequence, and the plan has a note."""
    plan = make(
        head + stage("a", "pile", 10) + stage("b", "german", 50, replay='{ fraction = 0.5, on_exhausted = "repeat" }')
    )

    assert ordinals(plan, "b", "pile", replayed=True) == [*range(200), *range(200), *range(100)]
    assert any('they repeat (on_exhausted = "repeat")' in note for note in plan.notes)


def test_reshuffled_replay_is_a_permutation_of_the_trained_sequences(head, make):
    """All 200, each once, in another order; another seed gives another order."""
    text = head + stage("a", "pile", 10) + stage("b", "german", 20, replay='{ fraction = 0.5, order = "reshuffled" }')
    first = ordinals(make(text), "b", "pile", replayed=True)
    other = ordinals(make(text, ("job.seed", "1")), "b", "pile", replayed=True)

    assert sorted(first) == sorted(other) == list(range(200))
    assert len({tuple(order) for order in (first, other, range(200))}) == 3


def test_replay_datasets_can_be_named_and_weighted(head, make):
    """A list is weighted by the sequences trained on, a table by its values."""
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
    """Stages of 30 + i steps on the datasets in turn, each with a tenth of replay."""
    replay = {"replay": '{ fraction = 0.1, on_exhausted = "repeat" }'}
    stages = (stage(f"s{i}", names[i % len(names)], 30 + i, **(replay if i else {})) for i in range(count))
    return head + datasets(*names[2:]) + "".join(stages)


def test_recurring_datasets_are_replayed_by_their_exact_shares(head, make):
    """Thirteen stages on three datasets in turn; the shares are computed here in exact fractions of 2,000 digits.

    Every dataset's count is off by less than two sequences in every stage.
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
    """Process time; every stage replays all datasets so far."""
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


def test_data_of_a_pretrained_model_counts_as_seen_once(head, make):
    """1601 tokens are 100 sequences of 16 and one more token; the 101st replayed sequence is refused."""
    text = head + stage("a", "german", 10, init='"checkpoint:x"', replay='{ fraction = 0.5, from = ["pile"] }')

    assert ordinals(make(text, tokens={"pile": 1601}), "a", "pile", replayed=True) == list(range(100))
    with pytest.raises(PlanError, match="100 sequences of 'pile' would be replayed in total, and 99 were trained on"):
        make(text, tokens={"pile": 1600})


def test_a_reshuffled_order_needs_the_size_of_its_data(head, make):
    """The plan can be made; its batches are refused until the data exists."""
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
def test_replay_without_earlier_data_is_refused(head, make, stages, expected):
    """No earlier data on the lineage, or none with a known share: the error says what to name."""
    with pytest.raises(PlanError) as refusal:
        make(head + stages)

    assert f"  - {expected}" in str(refusal.value)


def test_data_of_a_later_stage_cannot_be_replayed(head, make):
    """Weights trained from scratch have not seen it, in every form of `from`; a pretrained model may have."""
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
    """It is new data; a dataset of the stage itself has no such note."""
    text = head + datasets("books") + stage("a", "pile", 10)
    notes = make(text + stage("b", "german", 10, replay='{ fraction = 0.1, from = "books" }')).notes
    own = make(text + stage("b", "pile", 10, replay='{ fraction = 0.1, from = "pile" }')).notes

    assert "stages.b.replay.from: 'books' was never trained on by these weights: it is new data, not replay" in notes
    assert not any("never trained on" in note for note in own)


def test_a_replay_of_zero_is_no_replay(two_stages, make):
    """The baseline without replay by one override, even if there is nothing to replay."""
    plan = make(two_stages, ("stages.second.replay.fraction", "0"), ("stages.second.init", "random"))

    assert {draw.source for draw in drawn(plan, "second")} == {"german"}


def test_replay_after_an_infinite_stage_ends_before_its_annealing(head, make):
    """85 of 100 steps: 1700 sequences can be replayed, the 1701st is refused."""
    text = head + stage("a", "pile", 100, INFINITE) + stage("b", "german", 100, replay="{ fraction = 0.85 }")

    assert ordinals(make(text), "b", "pile", replayed=True) == list(range(1700))
    with pytest.raises(
        PlanError, match="1720 sequences of 'pile' would be replayed in total, and 1700 were trained on"
    ):
        make(text, ("stages.b.replay.fraction", "0.86"))


def test_domains_are_replayed_by_their_weights(domains, make):
    """10 % of 1000 sequences: 52 of CommonCrawl, its first ones in order; epochs only if all domains exist."""
    text = domains + stage("a", "slim", 500) + stage("b", "german", 50, replay="{ fraction = 0.1 }")
    tokens = {f"slim.{name}": 16_001 for name in SLIMPAJAMA}
    plan = make(text, tokens=tokens)
    crawl = ordinals(plan, "b", "slim.commoncrawl", replayed=True)

    assert crawl == list(range(len(crawl)))
    assert abs(len(crawl) - 52.09) < 2
    assert plan_as_json(plan)["stages"][1]["datasets"]["slim"]["tokens"] == 100 * 16
    assert plan.stages[0].use_by_dataset["slim"].epochs == pytest.approx(10_000 / 7000, rel=1e-3)
    assert make(text, tokens=tokens | {"slim.book": None}).stages[0].use_by_dataset["slim"].epochs is None
