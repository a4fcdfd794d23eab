"""Values of options and config overrides: what is accepted, and the message for what is not."""

import argparse

import pytest

from titan_cpt.commands.arguments import (
    learning_rate,
    parse_overrides,
    positive_int,
    probability,
    refuse_unknown,
    step_list,
    temperature,
    token_count,
)
from titan_cpt.errors import ConfigError


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (positive_int, "1", 1),
        (step_list, "0,7", (0, 7)),
        (token_count, "2.5K", 2500),
        (learning_rate, "0", 0.0),
        (learning_rate, "3e-4", 3e-4),
        (temperature, "0", 0.0),
        (probability, "1", 1.0),
        (probability, "0.05", 0.05),
    ],
)
def test_a_valid_value_is_parsed(parse, text, value):
    """The ends of each range included."""
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (positive_int, "0"),
        (step_list, "3,-1"),
        (token_count, "0"),
        (token_count, "ten"),
        (learning_rate, "-1e-4"),
        (learning_rate, "nan"),
        (learning_rate, "inf"),
        (temperature, "-1"),
        (temperature, "nan"),
        (probability, "0"),
        (probability, "1.01"),
        (probability, "nan"),
    ],
)
def test_a_value_out_of_range_is_an_error_that_shows_it(parse, text):
    """argparse prints the message behind the option's name."""
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        parse(text)


def test_overrides_are_pairs_in_the_order_given():
    """With a space or an equals sign; a value may itself contain one, or begin with a minus."""
    words = ["--a.b", "1", "--c.d=x=y", "--e.f", "-1", "--a.b=2"]

    assert parse_overrides(words) == [("a.b", "1"), ("c.d", "x=y"), ("e.f", "-1"), ("a.b", "2")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--verbose", "3"], "unknown argument '--verbose'; override a config key with --table.key value"),
        (["stray"], "unknown argument 'stray'"),
        (["--a.b", "1", "--c.d"], "--c.d has no value; write --c.d VALUE"),
    ],
)
def test_other_words_are_config_errors(words, message):
    """The message says which word, and what is allowed."""
    with pytest.raises(ConfigError, match=message):
        parse_overrides(words)


def test_a_command_without_overrides_refuses_every_word():
    """No word: no overrides."""
    assert refuse_unknown([]) == []
    with pytest.raises(ConfigError, match=r"unknown argument '--a\.b'; --help lists"):
        refuse_unknown(["--a.b", "1"])
