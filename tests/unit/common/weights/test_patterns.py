"""Patterns of weights. The reference for matching is Python's regular expressions, written from the documentation."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.common.weights.patterns import matches, pattern_problem, short_list, specificity

NAMES = [
    "embedding.weight",
    *(
        f"blocks.{layer}.{part}"
        for layer in range(12)
        for part in ("attention.qkv.weight", "mlp.up.bias", "mlp_norm.weight")
    ),
    "final_norm.weight",
    "head.weight",
]


@pytest.mark.parametrize(
    ("pattern", "selected"),
    [
        ("embedding", ["embedding.weight"]),
        ("embedding.weight", ["embedding.weight"]),
        ("embedding.weights", []),
        ("embed", []),
        ("blocks.1", [name for name in NAMES if name.startswith("blocks.1.")]),
        ("blocks.9-10", [name for name in NAMES if name.startswith(("blocks.9.", "blocks.10."))]),
        ("blocks.*.mlp", [name for name in NAMES if ".mlp." in name]),
        ("blocks.*.mlp*", [name for name in NAMES if ".mlp" in name]),
        ("*.weight", ["embedding.weight", "final_norm.weight", "head.weight"]),
        ("*", NAMES),
        ("embedding.new", []),
        ("head.new", []),
    ],
)
def test_a_pattern_selects_the_names_that_begin_with_it(pattern, selected):
    assert [name for name in NAMES if matches(pattern, name)] == selected


components = st.one_of(
    st.sampled_from(["blocks", "mlp", "weight", "attention", "1", "7", "11"]),
    st.builds("{}-{}".format, st.integers(0, 6), st.integers(6, 13)),
    st.from_regex(r"[a-z*]{1,5}", fullmatch=True),
)


@given(st.lists(components, min_size=1, max_size=4).map(".".join), st.sampled_from(NAMES))
def test_any_pattern_is_the_regular_expression_of_its_components(pattern, name):
    """A range is an alternative of its numbers, `*` is [^.]*, and the name ends or continues with a component."""

    def expression(component):
        if "-" in component:
            first, last = map(int, component.split("-"))
            return "(" + "|".join(map(str, range(first, last + 1))) + ")"
        return component.replace("*", "[^.]*")

    whole = r"\.".join(map(expression, pattern.split(".")))
    assert pattern_problem(pattern) is None
    assert matches(pattern, name) == (re.fullmatch(rf"{whole}(\..*)?", name) is not None)


@given(st.text(max_size=12))
def test_any_text_is_a_pattern_or_has_one_message(text):
    problem = pattern_problem(text)
    assert problem is None or repr(text) in problem


@pytest.mark.parametrize("pattern", ["", ".", "a..b", "a.", "blocks.3-1", "blocks.0-", "a b", "a-b", "[ab]", "a.?"])
def test_a_pattern_with_wrong_syntax_has_a_message(pattern):
    assert pattern_problem(pattern) is not None


def test_new_rows_are_more_specific_than_the_weight_that_has_them():
    assert [specificity(pattern) for pattern in ("head", "head.weight", "head.new")] == [1, 2, 3]


def test_the_names_of_blocks_are_listed_once():
    listed = "blocks.0-11.attention.qkv.weight, blocks.0-11.mlp.up.bias, blocks.0-11.mlp_norm.weight"
    assert short_list(NAMES) == f"embedding.weight, {listed}, final_norm.weight, head.weight"
    assert short_list(["blocks.1.a", "blocks.3.a"]) == "blocks.1.a, blocks.3.a"
    assert short_list(["blocks.2.a"]) == "blocks.2.a"
