"""The plan of a stage that initializes the rows of new tokens: text, JSON, recipe, refusals."""

import pytest
from plans import stage, text_of

from titan_cpt.errors import ConfigError, PlanError
from titan_cpt.planning.plan_json import plan_as_json

EXTENDED = {"vocab_size": 300, "base_vocab_size": 257}  # 43 new ids; the model has 384 rows


def test_new_rows_are_in_the_plan_the_json_and_the_recipe(head, make):
    """A stage that has no key and starts from the stage before leaves the rows as they are."""
    text = head + stage("a", "pile", 20) + stage("b", "pile", 20, new_rows='"mean"') + stage("c", "pile", 20)
    plan = make(text, **EXTENDED)
    plain = make(text.replace('new_rows = "mean"', ""), **EXTENDED)
    said = plan_as_json(plan)["stages"]
    assert [each["new_rows"] for each in said] == [
        None,
        {"kind": "mean", "first": 257, "end": 300, "if_of_base": False, "rows": 43, "padding_rows": 84},
        None,
    ]
    assert (
        "stage b starts with 43 new rows of embedding and head, each the mean of the old rows; 84 padding rows"
        in text_of(plan)
    )
    assert plan.stages[1].recipe == {**plain.stages[1].recipe, "new_rows": "mean"}
    assert plan.stages[0].recipe == plain.stages[0].recipe
    assert "new rows" not in text_of(plain)


@pytest.mark.parametrize("init", ["hf:model", "checkpoint:model"])
def test_without_the_key_rows_of_weights_from_elsewhere_are_made_of_pieces_if_they_are_of_the_base(head, make, init):
    """Which is known when the weights are read; the recipe does not change."""
    text = head + stage("a", "pile", 20, init=f'"{init}"')
    plan = make(text, ("model.tie_embeddings", "true"), ("model.family", "llama"), **EXTENDED)
    assert (
        "stage a starts with 43 new rows of the embedding (tied), each the mean of its pieces' rows; 84 padding rows: "
        "the mean of the old rows, if the initial weights were trained with the base tokenizer" in text_of(plan)
    )
    assert "new_rows" not in plan.stages[0].recipe
    assert make(text).stages[0].new_rows is None


@pytest.mark.parametrize(
    ("keys", "extended", "message"),
    [
        ({"init": '"hf:x"'}, {}, r"stages\.b\.new_rows: the tokenizer has no new tokens, because \[tokenizer\] has no"),
        ({"init": '"random"'}, EXTENDED, r'stages\.b\.new_rows: init = "random" draws all rows: remove new_rows'),
        ({"optimizer_state": '"keep"'}, EXTENDED, r"stages\.b\.new_rows: optimizer_state = \"keep\" would continue"),
    ],
)
def test_a_stage_that_cannot_have_new_rows_is_refused(head, make, keys, extended, message):
    with pytest.raises(PlanError, match=message):
        make(head + stage("a", "pile", 20) + stage("b", "pile", 20, new_rows='"pieces"', **keys), **extended)


def test_another_kind_is_refused(head, make):
    with pytest.raises(ConfigError, match=r"stages.a.new_rows: must be one of 'pieces', 'mean', 'normal', got 'zero'"):
        make(head + stage("a", "pile", 20, new_rows='"zero"'), **EXTENDED)
