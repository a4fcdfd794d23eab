"""Loading a config: a dumped config loads to itself, and random changes are refused with a message."""

import copy
import sys
import tempfile
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_cpt.config.load import dump_config, load_config
from titan_cpt.config.toml_files import read_with_bases
from titan_cpt.data.inventory import DataInventory
from titan_cpt.errors import ConfigError, TitanError
from titan_cpt.planning.planner import make_plan

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIGS = Path(__file__).parents[3] / "train_configs"


EVERYTHING = """
[datasets.slimpajama.domains.wikipedia]
train = "data/slimpajama/wikipedia"
weight = 4.00
[datasets.slimpajama.domains.book]
train = ["a", "b"]
validation = "c"
weight = 3
[[stages]]
name = "third"
dataset = { pile = 0.5, german = 1 }
tokens = "3.2K"
init = "stage:first@pre_anneal"
optimizer_state = "keep"
optimizer = { beta2 = 0.99 }
lr = { schedule = "infinite_inv_sqrt", max = 1, constant = 1e-4, cooldown_until = "320", constant_until = 1.0 }
replay = { fraction = 0.1, from = ["slimpajama"], order = "reshuffled", on_exhausted = "repeat" }
[[stages]]
name = "fourth"
dataset = "german"
steps = 3
lr = { schedule = "wsd", max = 1.5e-5, min = 0, warmup_until = 1, decay_from = 0.5, decay = "sqrt" }
replay = { fraction = 0.1, from = { pile = 0.25, slimpajama = 0.75 } }
"""


@pytest.mark.parametrize("more", ["", EVERYTHING])
def test_a_dumped_config_loads_to_the_same_config(two_stages, load, write, more):
    """dump_config writes every default; dumping the loaded config gives the same text."""
    config = load(two_stages + more)
    text = dump_config(config)
    again = load_config(write(text, "resolved.toml"))

    assert again == config
    assert dump_config(again) == text
    assert tomllib.loads(text)["optimizer"]["beta1"] == 0.9
    assert repr(again) == repr(config)  # 1 and 1.0 stay different


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_config_loads_again_after_a_dump(path, write):
    """Including its bases: the resolved file needs no other file."""
    config = load_config(path)

    assert load_config(write(dump_config(config), "resolved.toml")) == config
    assert "extends" not in read_with_bases(path)


KEYS = st.one_of(
    st.sampled_from(
        ["name", "train", "steps", "lr", "schedule", "from", "weight", "source", "extra", "stages", "init"]
    ),
    st.text(max_size=5),
)
SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-3, 70),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=5),
    st.sampled_from(
        ["previous", "random", "stage:first@pre_anneal", "pile", "cosine", "3B", "[/]", "a.b", "hf:x", "tb"]
    ),
    st.dates(),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)


VALID = tomllib.loads("""
job.name = "spoilt"
model = { family = "gpt_neox", size = "debug" }
datasets.pile = { train = "data/pile", validation = "data/pile-validation" }
datasets.german.domains.web = { train = ["data/web"], weight = 2 }
datasets.german.domains.news = { train = "data/news", weight = 0.5 }
training = { global_batch_size = 20, local_batch_size = 2, seq_len = 16 }
validation = { final_window_steps = 20 }
[[stages]]
name = "first"
dataset = "pile"
steps = 100
lr = { schedule = "infinite_cosine", max = 1e-3, constant = 5e-4, cooldown_until = 0.5, constant_until = 0.9 }
[[stages]]
name = "second"
dataset = { german = 1 }
tokens = "3K"
lr = { schedule = "wsd", max = 1e-3, min = 1e-4, warmup_until = 1, decay_from = "1.6K", decay = "exponential" }
replay = { fraction = 0.25, from = ["pile"], order = "reshuffled", on_exhausted = "repeat" }
""")


def every_place(value, place=()):
    """All paths into nested tables and lists; outer ones first."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*place, key)
        yield from every_place(inner, (*place, key))


@st.composite
def spoilt_configs(draw, valid):
    """A valid config in which up to three values are replaced, removed or added."""
    raw = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(list(every_place(raw))))
        table = raw
        for part in path:
            table = table[part]
        action = draw(st.sampled_from(["set", "set", "set", "remove", "add"]))
        if action == "set":
            table[last] = draw(VALUES)
        elif action == "remove":
            del table[last]
        elif isinstance(table, dict):
            table[draw(KEYS)] = draw(VALUES)
        else:
            table.append(draw(VALUES))
    return raw


def load_tables(raw, *overrides):
    """The config with these tables, loaded from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text(tomli_w.dumps(raw))
        return load_config(path, overrides)


@given(st.data())
@settings(max_examples=250)
def test_a_config_with_random_changes_plans_or_is_refused(data):
    """A plan or a TitanError, whatever is replaced: never another exception."""
    raw = data.draw(spoilt_configs(VALID))
    try:
        config = load_tables(raw)
        plan = make_plan(config, DataInventory({"pile": None, "german.web": 10_000, "german.news": 900}, 257))
    except TitanError as refusal:
        message = str(refusal)
    else:
        message = plan.fingerprint

        assert [stage.lr_at(stage.steps - 1) >= 0 for stage in plan.stages] == [True] * len(config.stages)

    assert message


@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_random_tables_are_refused_with_a_message(raw):
    """None of them is a complete config: always a ConfigError."""
    with pytest.raises(ConfigError, match=r"(problems?|extends|must fit)"):
        load_tables(raw)


@given(
    st.lists(st.sampled_from(["stages", "first", "lr", "replay", "datasets", "job", "max", ""]) | KEYS, min_size=1),
    st.text(),
)
def test_random_overrides_are_applied_or_refused(parts, text):
    """Whatever follows --: a config or a ConfigError."""
    try:
        result = load_tables(VALID, (".".join(parts), text)).stages[0].name
    except ConfigError as refusal:
        result = str(refusal)

    assert result
