"""The three lists: a key is listed once, values have their type, and what is left is off, unset or unmatched."""

import pytest

from titan_cpt.convert.conversion import Conversion, flattened, shown
from titan_cpt.errors import ConfigError


def test_a_key_that_is_listed_twice_is_a_fault_of_the_converter():
    out = Conversion("x", {"a": 1})
    out.set("training.seq_len", 1, of=["a"])
    with pytest.raises(AssertionError, match="listed twice"):
        out.no_counterpart("a", "why")


def test_what_is_left_is_unset_off_or_without_counterpart():
    out = Conversion("x", {"unset": None, "off": False, "on": True, "log_a": 1, "log_b": 2, "new": False})
    out.finish({"off": "none here", "on": "none here", "log_*": "see the log"})
    assert [(finding.keys, finding.text) for finding in out.converted] == [
        (("unset",), "not set"),
        (("off",), "off, as here"),
    ]
    assert {finding.keys: finding.text for finding in out.unmatched} == {
        ("on",): "none here",
        ("log_a", "log_b"): "see the log",
        ("new",): "not known as keys of x: look up what they do there",
    }


@pytest.mark.parametrize(("text", "number"), [("1e-4", 1e-4), ("3", 3), (2, 2), (0.5, 0.5), ("1E3", 1000)])
def test_numbers_may_be_texts_because_yaml_reads_1e_minus_4_as_one(text, number):
    assert Conversion("x", {"a": text}).number("a") == number


@pytest.mark.parametrize("value", ["x", True, [1], float("nan"), float("inf"), "1.0e_8"])
def test_what_is_no_number_is_refused_with_its_key(value):
    with pytest.raises(ConfigError, match=r"a: must be a number, got .*; correct it"):
        Conversion("x", {"a": value}).number("a")


@pytest.mark.parametrize("value", [[0.9], [0.9, "x"], 0.9, [0.9, None], [1, 2, 3]])
def test_betas_are_two_numbers(value):
    assert Conversion("x", {"a": [0, "1e-1"]}).pair("a", (1.0, 1.0)) == (0.0, 0.1)
    with pytest.raises(ConfigError, match="a: must be a list of two numbers"):
        Conversion("x", {"a": value}).pair("a", (1.0, 1.0))


def test_whole_numbers_flags_and_texts_are_checked():
    out = Conversion("x", {"a": 1.5, "b": -1, "c": 1, "d": 2})
    for read, message in (
        (lambda: out.whole("a"), "a whole number"),
        (lambda: out.whole("b"), "0 or more"),
        (lambda: out.flag("c"), "true or false"),
        (lambda: out.text("d"), "a text"),
    ):
        with pytest.raises(ConfigError, match=message):
            read()


def test_tables_are_flattened_and_lists_are_values():
    assert flattened({"a": {"b": 1, "c": {}}, "d": [{"e": 1}], 5: None}) == {
        "a.b": 1,
        "a.c": {},
        "d": [{"e": 1}],
        "5": None,
    }
    with pytest.raises(ValueError, match=r"a\.b is there twice"):
        flattened({"a.b": 1, "a": {"b": 2}})


def test_long_values_are_shortened_to_one_line():
    assert shown("a\nb") == '"a b"'
    assert shown(list(range(99))).endswith("...")
    assert len(shown("x" * 1000)) == 60
