"""[model]: keys of a RoPE scaling belong to its kind; families and unset keys."""

import pytest

from titan_cpt.config.load import load_config
from titan_cpt.errors import ConfigError


def model_of(write, one_stage, table):
    """The [model] table of a config with these lines in it."""
    return load_config(write(one_stage.replace('size = "debug"\n', f'size = "debug"\n{table}\n'))).model


@pytest.mark.parametrize(
    ("kind", "own", "foreign"),
    [
        ("llama3", "low_freq_factor = 2.0", "beta_fast = 16.0"),
        ("llama3", "high_freq_factor = 8.0", "attention_factor = 1.5"),
        ("yarn", "beta_slow = 2.0", "low_freq_factor = 2.0"),
        ("yarn", "attention_factor = 1.5", "high_freq_factor = 8.0"),
    ],
)
def test_a_rope_scaling_has_the_keys_of_its_kind(write, one_stage, kind, own, foreign):
    """A key of the other kind is an error that names it."""
    head = f'rope_scaling = {{ kind = "{kind}", factor = 4.0, original_seq_len = 64, '
    scaling = model_of(write, one_stage, f"{head}{own} }}").rope_scaling
    key, _, value = own.partition(" = ")

    assert (scaling.kind, getattr(scaling, key)) == (kind, float(value))
    assert getattr(scaling, foreign.partition(" = ")[0]) is None
    with pytest.raises(ConfigError, match=f'kind = "{kind}" has no {foreign.partition(" = ")[0]}; allowed are '):
        model_of(write, one_stage, f"{head}{foreign} }}")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("layers = 0", "model.layers"),
        ("rotary_fraction = 1.5", "model.rotary_fraction"),
        ("rope_base = -1.0", "model.rope_base"),
        ("sliding_window = 0", "model.sliding_window"),
        ('rope_scaling = { kind = "yarn", factor = 0.5, original_seq_len = 64 }', "model.rope_scaling.factor"),
        ('rope_scaling = { kind = "yarn", factor = 4.0 }', 'original_seq_len is missing: kind = "yarn" needs it'),
        ('rope_scaling = { kind = "linear", factor = 4.0, original_seq_len = 64 }', "has no original_seq_len; allowed"),
    ],
)
def test_a_value_out_of_range_is_an_error_under_its_key(write, one_stage, table, message):
    """Before a model is built."""
    with pytest.raises(ConfigError, match=message):
        model_of(write, one_stage, table)


def test_unset_keys_are_left_to_the_size(write, one_stage):
    """None, which the registry replaces."""
    model = model_of(write, one_stage, "layers = 3")

    assert (model.family, model.size, model.layers) == ("gpt_neox", "debug", 3)
    assert {value for name, value in model if name not in ("family", "size", "layers")} == {None}
