"""Stages with different sequence lengths: budgets, new data and replay continue by tokens; plans worked out by hand."""

from fractions import Fraction

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from plans import datasets, drawn, ordinals, stage

from titan_cpt.data.mixture import Draw
from titan_cpt.data.trained_text import Leg, TrainedPart
from titan_cpt.errors import PlanError
from titan_cpt.planning.plan_json import batch_as_json

HALF = "{ fraction = 0.5, from = 'pile' }"
LONG = {"seq_len": 64, "global_batch_size": 4, "local_batch_size": 1}  # [training] has 20 sequences of 16 tokens


def replayed(plan, name):
    return [draw for draw in drawn(plan, name) if draw.replayed]


def test_a_run_of_two_lengths_draws_what_a_plan_by_hand_says(head, make):
    """Ten steps of 16-token sequences, three of 64-token ones with half of them replay: 2 of 4 sequences in a step.

    The six replayed sequences are sequences 0 to 23 of the first stage, four after another.
    """
    plan = make(head + stage("short", "pile", 10) + stage("long", "german", 3, replay=HALF, **LONG))
    by_hand = [
        Draw("pile", 4 * row, True, tuple(TrainedPart(16, 4 * row + part, 0, 16) for part in range(4)))
        for row in range(6)
    ]

    assert replayed(plan, "long") == by_hand
    assert [draw for draw in drawn(plan, "long") if not draw.replayed] == [Draw("german", i, False) for i in range(6)]
    assert batch_as_json(plan, "long", "0") == [
        ("pile", 0, [[16, 0, 0, 16], [16, 1, 0, 16], [16, 2, 0, 16], [16, 3, 0, 16]]),
        ("german", 0),
        ("pile", 4, [[16, 4, 0, 16], [16, 5, 0, 16], [16, 6, 0, 16], [16, 7, 0, 16]]),
        ("german", 1),
    ]


def test_new_data_continues_behind_the_tokens_that_were_trained_on(head, make):
    """3,200 tokens of 16-token sequences; of 48-token ones the 67th is the first behind them; then 16-token ones again.

    A step of the middle stage has 4 x 48 tokens, so the last stage begins behind 67 x 48 rounded up, 5 x 192 further.
    """
    middle = LONG | {"seq_len": 48}
    plan = make(head + stage("a", "pile", 10) + stage("b", "pile", 5, **middle) + stage("c", "pile", 1))

    assert ordinals(plan, "b", "pile", replayed=False) == list(range(67, 87))
    assert ordinals(plan, "c", "pile", replayed=False)[0] == (3200 + 5 * 192) // 16
    assert plan.stage("c").history.trained == {"pile": (Leg(16, 0, 200), Leg(48, 67, 20))}


def test_replay_continues_at_the_token_where_it_ended(head, make):
    """Three rows of 24 tokens end inside the fifth sequence of 16; rows of 16 then have two parts, from token 72 on."""
    short = {"seq_len": 24, "global_batch_size": 6, "local_batch_size": 1}
    plan = make(
        head
        + datasets("books")
        + stage("a", "pile", 10)
        + stage("b", "german", 1, replay=HALF, **short)
        + stage("c", "books", 1, replay=HALF)
    )

    assert [draw.parts for draw in replayed(plan, "b")] == [
        (TrainedPart(16, 0, 0, 16), TrainedPart(16, 1, 0, 8)),
        (TrainedPart(16, 1, 8, 16), TrainedPart(16, 2, 0, 16)),
        (TrainedPart(16, 3, 0, 16), TrainedPart(16, 4, 0, 8)),
    ]
    assert plan.stage("c").history.replayed == {"pile": 72}
    assert [draw.parts for draw in replayed(plan, "c")][:2] == [
        (TrainedPart(16, 4, 8, 16), TrainedPart(16, 5, 0, 8)),
        (TrainedPart(16, 5, 8, 16), TrainedPart(16, 6, 0, 8)),
    ]


def test_replay_of_the_same_length_is_whole_sequences_also_after_another_length(head, make):
    """Pile in 16 and 64 tokens: replay in 64 tokens has four old sequences each, and then whole ones of its length."""
    plan = make(
        head + stage("a", "pile", 1) + stage("b", "pile", 3, **LONG) + stage("c", "german", 5, replay=HALF, **LONG)
    )
    rows = replayed(plan, "c")

    assert [len(draw.parts) for draw in rows] == [4] * 5 + [0] * 5  # 20 sequences of 16 tokens, then of 64
    assert [draw.ordinal for draw in rows[5:]] == [5, 6, 7, 8, 9]  # behind 320 tokens


def test_exposure_counts_tokens(head, make):
    """A sequence of 64 tokens counts as four of 16, so weights of replay are shares of tokens."""
    plan = make(
        head
        + datasets("books")
        + stage("a", "pile", 10)
        + stage("b", "german", 10, **LONG)
        + stage("c", "books", 10, replay="{ fraction = 0.9 }")
    )

    assert plan.stage("c").history.exposure == {"pile": 200, "german": 160}
    assert plan.stage("c").shares["pile"] == Fraction(9, 10) * Fraction(200, 360)


@pytest.mark.parametrize("how", ["error", "repeat"])
def test_replay_of_more_tokens_than_were_trained_on_is_refused_or_noted(head, make, how):
    """320 tokens were trained on; six rows of 64 are 384."""
    replay = f'{{ fraction = 0.5, from = "pile", on_exhausted = "{how}" }}'
    text = head + stage("a", "pile", 1) + stage("b", "german", 3, replay=replay, **LONG)
    found = "stages.b.replay: 384 tokens of 'pile' would be replayed in total, and 320 were trained on"
    if how == "error":
        with pytest.raises(PlanError, match=found):
            make(text)
        return
    plan = make(text)

    assert any(note.startswith(found) for note in plan.notes)
    assert replayed(plan, "b")[5] == replayed(plan, "b")[0]


def test_reshuffled_replay_permutes_pieces_of_the_length_of_the_stage(head, make):
    """3,200 tokens are 50 pieces of 64; 50 rows have each of them once."""
    replay = '{ fraction = 0.5, from = "pile", order = "reshuffled" }'
    plan = make(head + stage("a", "pile", 10) + stage("b", "german", 25, replay=replay, **LONG))
    firsts = [draw.ordinal for draw in replayed(plan, "b")]

    assert sorted(firsts) == list(range(0, 200, 4))
    assert firsts != sorted(firsts)


def test_a_dataset_of_a_released_model_is_replayed_in_whole_sequences_of_each_length(head, make):
    """What the model was trained on is unknown: every length has its own order, which continues behind the tokens."""
    text = (
        head
        + stage("a", "german", 2, replay=HALF, init='"hf:some/model"')
        + stage("b", "german", 1, replay=HALF, **LONG)
    )
    plan = make(text, tokens={"pile": 100_000})

    assert replayed(plan, "a") == [Draw("pile", i, True) for i in range(20)]
    assert replayed(plan, "b") == [Draw("pile", i, True) for i in (5, 6)]  # 320 tokens before


def test_tokens_that_come_again_in_another_order_are_noted(head, make):
    """3,200 of 32,000 tokens of an epoch; none in stored order; only tokens of the current epoch count."""
    text = head + stage("a", "pile", 10) + stage("b", "pile", 1, **LONG)
    start = "stages.b: pile was trained on in sequences of 16 tokens, and those of 64 come in another order: "

    def noted(tokens=None, old="", new=""):
        plan = make(text.replace(old, new), tokens=tokens)
        return [note for note in plan.notes if "another order" in note]

    assert noted({"pile": 32_001}) == [f"{start}about 10.0% of its new tokens were trained on before in this epoch"]
    assert noted() == [f"{start}some of its new tokens were trained on before in this epoch"]
    assert noted({"pile": 3201}) == []
    assert noted({"pile": 2561}) == [f"{start}about 25.0% of its new tokens were trained on before in this epoch"]
    assert noted({"pile": 32_001}, 'train = "data/pile"', 'train = "data/pile"\norder = "as_stored"') == []


def test_a_source_must_have_a_sequence_of_every_length_that_is_drawn_from_it(head, make):
    """50 tokens are enough for 16 and not for 64."""
    text = head + stage("a", "pile", 1) + stage("b", "german", 1, **LONG)

    assert make(text, tokens={"pile": 50}).sequences == {("pile", 16): 3, ("german", 64): None}
    with pytest.raises(PlanError, match=r"datasets\.german\.train: 50 tokens are fewer than one sequence of 64 \+ 1"):
        make(text, tokens={"german": 50})


def test_an_end_point_in_tokens_is_a_point_of_the_ramp(head, make):
    """1,792 tokens are four steps of 256, and one and a half of 512: the warm-up ends there, at its peak after it."""
    lr = 'schedule = "constant", max = 1.0, warmup_until = "1_792"'
    ramp = LONG | {"global_batch_size": '{ "0" = 4, "1_000" = 8 }'}
    only = make(head + stage("a", "pile", 9, lr, **ramp)).stages[0]

    assert [only.lr_at(step) for step in range(6)] == pytest.approx([1 / 5.5, 2 / 5.5, 3 / 5.5, 4 / 5.5, 5 / 5.5, 1.0])
    assert only.recipe["lr.warmup_until"] == "11/2"


STAGES = st.lists(
    st.fixed_dictionaries(
        {
            "data": st.sampled_from(["pile", "german", "books"]),
            "seq_len": st.sampled_from([5, 16, 24, 64]),
            "size": st.sampled_from([2, 3, 8]),
            "steps": st.integers(1, 5),
            "replays": st.booleans(),
        }
    ),
    min_size=2,
    max_size=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STAGES)
def test_replay_is_the_trained_text_in_order_and_new_data_continues_behind_it(head, make, stages):
    """Any stages, against lists of tokens: (length, ordinal, position) of everything that was trained on, in order.

    Replay continues at the next token of the list, and begins again after its last one; budgets are exact.
    """
    text = head.replace("local_batch_size = 2", "local_batch_size = 1") + datasets("books")
    for number, each in enumerate(stages):
        keys = {"seq_len": each["seq_len"], "global_batch_size": each["size"]}
        if each["replays"] and {earlier["data"] for earlier in stages[:number]} - {each["data"]}:
            keys["replay"] = '{ fraction = 0.4, on_exhausted = "repeat" }'
        text += stage(f"s{number}", each["data"], each["steps"], **keys)
    try:
        plan = make(text)
    except PlanError as error:
        assume("raise its weight" not in str(error))  # a dataset of which the earlier stages draw nothing
        raise
    trained, replayed_tokens = {}, {}
    for number, each in enumerate(stages):
        new, old = {}, {}
        for draw in drawn(plan, f"s{number}"):
            parts = draw.parts or (TrainedPart(each["seq_len"], draw.ordinal, 0, each["seq_len"]),)
            tokens = [(part.seq_len, part.ordinal, place) for part in parts for place in range(part.start, part.stop)]
            (old if draw.replayed else new).setdefault(draw.source, []).extend(tokens)
        for source, tokens in old.items():
            known, first = trained[source], replayed_tokens.get(source, 0)
            assert tokens == [known[(first + place) % len(known)] for place in range(len(tokens))]
            replayed_tokens[source] = first + len(tokens)
        for source, tokens in new.items():
            before = trained.setdefault(source, [])
            assert tokens[0] == (each["seq_len"], -(-len(before) // each["seq_len"]), 0)
            assert not {*tokens} & {*before}
            before += tokens
        total = sum(map(len, [*new.values(), *old.values()]))
        assert total == plan.stages[number].tokens == each["steps"] * each["size"] * each["seq_len"]
