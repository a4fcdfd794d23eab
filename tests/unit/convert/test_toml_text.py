"""The written file is the converted config, its comments name the keys, and the lists have 80 columns."""

import tomli_w
from converted import converted
from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.config.toml_files import parse_toml
from titan_cpt.convert import gpt_neox
from titan_cpt.convert.conversion import Conversion
from titan_cpt.convert.toml_text import report_text, toml_text

VALUES = st.recursive(
    st.text() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@given(VALUES, VALUES)
def test_every_value_is_read_back_as_it_was(value, other):
    out = Conversion("x", {})
    out.values = {"job.a": value, "datasets.d.b": other, "stage.lr": {"schedule": "cosine", "max": 0.5}}
    tables = parse_toml(toml_text(out))
    expected = parse_toml(tomli_w.dumps({"a": value, "b": other}))
    assert tables["job"]["a"] == expected["a"]
    assert tables["datasets"]["d"]["b"] == expected["b"]
    assert tables["stages"] == [{"name": "pretrain", "lr": {"schedule": "cosine", "max": 0.5}}]


def test_comments_name_the_keys_and_the_lists_stand_at_the_end():
    text = toml_text(converted(gpt_neox, {"weight_decay": 0.1, "num_layers": 2, "te_x": True, "split": "1,0,0"}))
    assert "weight_decay = 0.1  # weight_decay\n" in text
    assert text.index("# No counterpart here:") < text.index("te_x") < text.index("# To check:") < text.index("split")
    assert "# ATTENTION: the model below is another one" in text  # learned positions, their default


def test_a_value_cannot_break_out_of_its_comment():
    text = toml_text(converted(gpt_neox, {"num_layers": 2, "new": "x\n[job]\nname = 'other'"}))
    assert parse_toml(text)["job"]["name"] == "theirs"


def test_lists_have_80_columns_and_count_their_keys():
    out = converted(gpt_neox, {"num_layers": 2, "zero_optimization.stage": 1, "zero_optimization.reduce_scatter": True})
    text = report_text(out)
    assert max(map(len, text.splitlines())) <= 80
    assert "converted: 1 key\n" in text
    assert "no counterpart here: 2 keys\n" in text
