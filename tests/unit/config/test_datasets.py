"""A dataset has exactly one source of tokens."""

import pytest


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ('train = "x"\n[datasets.extra.domains.a]\ntrain = "a"\nweight = 1', "give either train or domains, not both"),
        ("", "has no tokens: give train or domains"),
        ('train = ["a", "b"]\nsource = { text = "t" }', "with source, train must be one prefix"),
        ('train = "a"\nsource = { text = "t", holdout = 0.1 }', "must be the train prefix followed by"),
    ],
)
def test_a_dataset_has_exactly_one_source_of_tokens(one_stage, faults, table, expected):
    """Either train or domains; with a text source, one prefix that `prepare` writes."""
    (found,) = faults(f"{one_stage}\n[datasets.extra]\n{table}\n")

    assert found.startswith("datasets.extra: ")
    assert expected in found
