"""What a stage trains: rows and factors by hand, and laws for any patterns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.common.weights.partition import (
    FIRST_NEW_ROW,
    Part,
    make_partition,
    partition_of_recipe,
    partition_problems,
    trained_alike,
)
from titan_cpt.common.weights.patterns import matches

SIZES = {
    "embedding.weight": (20, 4),
    **{f"blocks.{layer}.{name}": (4, 4) for layer in range(3) for name in ("attention.weight", "mlp.weight")},
    "final_norm.weight": (4,),
    "head.weight": (20, 4),
}
B = 12


def partition(trainable=None, lr_scale=None, first_new_row=B):
    return make_partition(SIZES, trainable=trainable, lr_scale=lr_scale, first_new_row=first_new_row)


def problems(trainable=None, lr_scale=None, first_new_row=B, *, tied=False):
    given_patterns = {"trainable": trainable, "lr_scale": lr_scale, "first_new_row": first_new_row}
    return list(partition_problems(SIZES, tied=tied, **given_patterns))


def test_new_rows_are_those_from_the_base_vocabulary_on():
    found = partition(["embedding.new", "head.new", "blocks.1"])

    assert found.parts["embedding.weight"] == (Part((12, 20)),)
    assert found.rows("head.weight") == (12, 20)
    assert found.rows("blocks.1.mlp.weight") == (0, 4)
    assert found.rows("blocks.0.mlp.weight") == (0, 0)
    assert found.parameters == 8 * 4 + 8 * 4 + 2 * 16
    assert found.description == "4 of 9 weights, 96 of 260 parameters"


def test_a_weight_whose_parts_have_other_factors_is_split_and_otherwise_whole():
    split = partition(lr_scale={"embedding.new": 10, "embedding": 0.5})

    assert split.parts["embedding.weight"] == (Part((0, 12), 0.5, "embedding"), Part((12, 20), 10, "embedding.new"))
    assert split.rows("embedding.weight") == (0, 20)
    assert split.parts["head.weight"] == (Part(),)
    assert partition(lr_scale={"embedding": 0.5}).parts["embedding.weight"] == (Part(None, 0.5, "embedding"),)


def test_of_several_patterns_the_one_with_the_most_components_decides():
    found = partition(lr_scale={"blocks": 0.1, "blocks.0-1": 0.2, "blocks.*.mlp": 0.3, "*": 7.0})
    scales = {name: parts[0].scale for name, parts in found.parts.items()}

    assert scales == {
        "embedding.weight": 7.0,
        "blocks.0.attention.weight": 0.2,
        "blocks.0.mlp.weight": 0.3,
        "blocks.1.attention.weight": 0.2,
        "blocks.1.mlp.weight": 0.3,
        "blocks.2.attention.weight": 0.1,
        "blocks.2.mlp.weight": 0.3,
        "final_norm.weight": 7.0,
        "head.weight": 7.0,
    }
    assert found.scales == {"*": 7.0, "blocks.0-1": 0.2, "blocks.*.mlp": 0.3, "blocks": 0.1}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            {"trainable": ["embeding"]},
            "trainable: 'embeding' matches no weight; there are embedding.weight, blocks.0-",
        ),
        ({"lr_scale": {"blocks.7": 2}}, "lr_scale: 'blocks.7' matches no weight; there are"),
        (
            {"lr_scale": {"blocks.1-99": 2}},
            "lr_scale: 'blocks.1-99' is a range that ends where 'blocks.99' matches no weight; there are",
        ),
        ({"trainable": ["head.new"], "first_new_row": None}, "without [tokenizer] extend there are none"),
        ({"trainable": ["head"], "tied": True}, "is tied to the embedding, so write 'embedding' instead"),
        ({"trainable": ["head.new"], "tied": True}, "is tied to the embedding, so write 'embedding.new' instead"),
        (
            {"lr_scale": {"blocks.0-1": 2, "blocks.1": 3}},
            "lr_scale: 'blocks.1' = 3 and 'blocks.0-1' = 2 both match blocks.1.attention.weight",
        ),
        (
            {"trainable": ["embedding"], "lr_scale": {"blocks": 2}},
            "lr_scale: 'blocks' has no effect: trainable freezes what it selects",
        ),
        (
            {"lr_scale": {"head": 2, "head.weight": 3}},
            "lr_scale: 'head' has no effect: longer patterns decide for everything that it selects",
        ),
    ],
)
def test_patterns_that_select_nothing_or_contradict_each_other_have_a_message(patterns, message):
    found = problems(**patterns)
    assert len(found) == 1
    assert message in found[0]


def test_patterns_that_agree_are_no_problem():
    """Equal factors for one weight, and new rows with the factor that they have anyway."""
    assert problems(lr_scale={"blocks.0-1": 2, "blocks.1-2": 2, "embedding": 3, "embedding.new": 3}) == []
    assert problems(["embedding.new", "embedding", "blocks.1"], {"*": 2.0}) == []


def test_rows_decide_whether_two_stages_train_a_weight_alike():
    new, both = partition(["embedding.new"]), partition(lr_scale={"embedding.new": 3})

    assert not trained_alike("embedding.weight", new, None)
    assert not trained_alike("embedding.weight", new, both)
    assert trained_alike("embedding.weight", None, both)
    assert trained_alike("embedding.weight", None, None)
    assert trained_alike("embedding.weight", new, partition(["embedding.new", "head"]))
    assert not trained_alike("head.weight", new, both)


def test_a_recipe_gives_the_partition_of_its_stage():
    recipe = {
        "stages.first.trainable": ["embedding.new"],
        "stages.first.lr_scale": {"embedding.new": 2.0},
        f"stages.first.{FIRST_NEW_ROW}": 12,
        "stages.second.steps": 3,
    }
    assert partition_of_recipe(recipe, "first", SIZES) == partition(["embedding.new"], {"embedding.new": 2.0})
    assert partition_of_recipe(recipe, "second", SIZES) is None


patterns = st.sampled_from(
    ["*", "embedding", "embedding.weight", "embedding.new", "head.new", "blocks", "blocks.0-1", "blocks.2", "*.1.mlp"]
)


@given(
    st.none() | st.lists(patterns, min_size=1, unique=True),
    st.none() | st.dictionaries(patterns, st.sampled_from([0.5, 2.0]), min_size=1),
)
def test_any_patterns_train_each_row_at_most_once_and_exactly_what_is_selected(trainable, lr_scale):
    found = partition(trainable, lr_scale)
    for name, size in SIZES.items():
        rows = [row for part in found.parts[name] for row in range(*(part.rows or (0, size[0])))]
        whole = trainable is None or any(matches(pattern, name) for pattern in trainable)
        new = trainable is not None and f"{name.removesuffix('.weight')}.new" in trainable
        assert rows == list(range(size[0])) if whole else rows == list(range(B, size[0]) if new else [])
