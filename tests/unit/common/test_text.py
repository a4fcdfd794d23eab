"""Pieces of messages."""

from titan_cpt.common.text import did_you_mean, quoted_list


def test_the_closest_known_words_are_suggested():
    """In order of similarity; nothing for a word that is not similar to any."""
    assert did_you_mean("sede", ["seed", "name"]) == "; did you mean 'seed'?"
    assert did_you_mean("hellaswagg", ["hellaswag", "hellaswag_de", "arc"], at_most=2) == (
        "; did you mean 'hellaswag' or 'hellaswag_de'?"
    )
    assert did_you_mean("xyzzy", ["seed", "name"]) == ""


def test_a_list_of_words_is_quoted():
    """No words are "none"."""
    assert quoted_list(["a", "b"]) == "'a', 'b'"
    assert quoted_list([]) == "none"
