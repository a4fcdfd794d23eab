"""Mixtures of datasets and domains: every prefix has the configured weights."""

from fractions import Fraction

from plans import SLIMPAJAMA, drawn, stage

from titan_cpt.planning.plan_json import plan_as_json


def test_domains_have_their_weights_to_less_than_two_sequences(domains, make):
    """SlimPajama's seven weights sum to 100: of 10,000 sequences each domain gets its hundredths, to less than two."""
    (answer,) = plan_as_json(make(domains + stage("a", "slim", 500)))["stages"]
    got = {name: use["tokens"] / 16 for name, use in answer["domains"].items()}

    assert got.keys() == {f"slim.{name}" for name in SLIMPAJAMA}
    assert all(abs(got[f"slim.{name}"] - 100 * weight) < 2 for name, weight in SLIMPAJAMA.items())
    assert sum(got.values()) * 16 == answer["datasets"]["slim"]["tokens"] == answer["tokens"]


def test_two_datasets_are_mixed_by_their_weights(head, make):
    """{ pile = 0.5, german = 0.5 } alternates; weights are relative, such as 3 and 1."""
    half = make(head + stage("a", "{ pile = 0.5, german = 0.5 }", 10))
    more = make(head + stage("a", "{ german = 1, pile = 3 }", 10))

    assert {sum(draw.source == "pile" for draw in drawn(half, "a")[i : i + 2]) for i in range(0, 200, 2)} == {1}
    assert dict(more.stages[0].shares) == {"pile": Fraction(3, 4), "german": Fraction(1, 4)}
    assert {draw.replayed for draw in drawn(half, "a")} == {False}
