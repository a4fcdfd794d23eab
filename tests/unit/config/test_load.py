"""From files and command line to a Config: overrides, extends, the round trip, and files full of nonsense."""

import copy
import os
import re
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


@pytest.fixture
def load(write):
    """load(text, *overrides) of a config's text."""
    return lambda text, *overrides: load_config(write(text), overrides)


# Overrides


def test_an_override_sets_the_key_of_a_stage_by_its_name(two_stages, load):
    """And of nothing else."""
    before = load(two_stages)
    after = load(two_stages, ("stages.second.replay.fraction", "0.5"))

    assert after.stages[1].replay.fraction == 0.5
    assert after.stages[0] == before.stages[0]
    assert after.model_copy(update={"stages": before.stages}) == before


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("training.seq_len", "512", 512),
        ("training.seq_len", "1_024", 1024),
        ("job.deterministic", "true", True),
        ("optimizer.eps", "1e-6", 1e-6),
        ("training.mixed_precision_param", "float32", "float32"),
        ("training.mixed_precision_param", '"float32"', "float32"),
        ("job.name", "7", "7"),
        ("job.name", "true", "true"),
        ("job.description", "1 + 1", "1 + 1"),
        ("job.output_dir", "2024-01-01", "2024-01-01"),
        ("model.size", "405m", "405m"),
        ("float8.filter_fqns", '["head", "mlp"]', ("head", "mlp")),
    ],
)
def test_an_override_is_read_as_toml_and_a_string_key_takes_its_text(one_stage, load, key, text, value):
    """A job named 7 is named "7"; a bare word needs no quotes; numbers, lists and booleans are TOML's."""
    found = load(one_stage, (key, text))
    for part in key.split("."):
        found = getattr(found, part)

    assert found == value


@pytest.mark.parametrize(
    ("text", "value"), [("0.05", 0.05), ("5", 5), ("1600", 1600), ('"1600"', "1600"), ("3B", "3B"), ("1.0", 1.0)]
)
def test_an_end_point_keeps_its_kind_on_the_command_line(one_stage, load, text, value):
    """Share, step and tokens are told apart as they are in the file."""
    found = load(one_stage, ("stages.first.lr.warmup_until", text)).stages[0].lr.warmup_until

    assert found == value
    assert type(found) is type(value)


def test_an_override_makes_the_table_that_is_missing(one_stage, load):
    """A replay, a model number, a whole dataset."""
    config = load(
        one_stage,
        ("stages.first.replay.fraction", "0.1"),
        ("stages.first.replay.from", "german"),
        ("validation.interval", "7"),
        ("datasets.books.train", "data/books"),
    )

    assert (config.stages[0].replay.fraction, config.stages[0].replay.from_) == (0.1, ("german",))
    assert config.validation.interval == 7
    assert config.datasets["books"].train == ("data/books",)


def test_the_last_override_wins(one_stage, load):
    """As on any command line."""
    assert load(one_stage, ("job.seed", "1"), ("job.seed", "2")).job.seed == 2


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("stages.frist.steps", "3", "--stages.frist.steps: there is no stage 'frist'; did you mean 'first'?"),
        ("stages.first", "3", "--stages.first: is not a key; a stage's key is written stages.NAME.KEY"),
        ("job.name.x", "3", "--job.name.x: job.name is a value, not a table"),
        ("job.name.x.y", "3", "--job.name.x.y: job.name is a value, not a table"),
        ("job.nmae", "3", "job.nmae: unknown key; did you mean 'name'?"),
        ("trianing.seq_len", "3", "trianing: unknown key; did you mean 'training'?"),
        ("training.seq_len", "16\nmax_norm = 3.0", "training.seq_len: must be an integer, got '16\\nmax_norm = 3.0'"),
        ("training.seq_len", "", "training.seq_len: must be an integer, got ''"),
        ("training.seq_len", "9" * 30, "--training.seq_len: integers must fit into 64 bits"),
        ("training.seq_len", "9" * 5000, "training.seq_len: must be an integer, got '9999"),
        ("job.seed", "0x" + "f" * 5000, "--job.seed: integers must fit into 64 bits"),
        ("stages.first.tokens", "9" * 5000, "stages.first.tokens: "),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(one_stage, load, key, text, expected):
    """With the name that was meant, where one is near; a second line of text is not read as a second key."""
    with pytest.raises(ConfigError) as refusal:
        load(one_stage, (key, text))

    assert any(line.startswith(f"  - {expected}") for line in str(refusal.value).splitlines())


def test_a_stage_named_like_a_key_is_overridden_all_the_same(one_stage, load):
    """Its string keys still take text: a dataset of the name 7 stays a name."""
    text = one_stage.replace('name = "first"', 'name = "lr"')

    assert load(text, ("stages.lr.init", "random")).stages[0].init == "random"
    assert load(text, ("stages.lr.lr.max", "0.5")).stages[0].lr.max == 0.5


# extends


def test_what_extends_lies_over_its_base(one_stage, write):
    """Tables are merged key by key, values replaced, and nothing of the base is lost."""
    write(one_stage, "base.toml")
    path = write('extends = "base.toml"\n[job]\nname = "child"\n[training]\nseq_len = 32\n')
    config = load_config(path)

    assert (config.job.name, config.training.seq_len, config.training.global_batch_size) == ("child", 32, 20)
    assert [stage.name for stage in config.stages] == ["first"]


def test_of_several_bases_the_later_one_wins_and_the_file_over_all(one_stage, write):
    """Left to right, then the file itself."""
    write(one_stage, "base.toml")
    write("[job]\nseed = 1\ndescription = 'one'\noutput_dir = 'one'\n", "one.toml")
    write("[job]\nseed = 2\ndescription = 'two'\n", "two.toml")
    config = load_config(write("extends = ['base.toml', 'one.toml', 'two.toml']\n[job]\nseed = 3\n"))

    assert (config.job.seed, config.job.description, config.job.output_dir) == (3, "two", "one")


def test_stages_are_merged_by_name_and_new_ones_appended(two_stages, write):
    """The timetable of the base keeps its order; other lists are replaced."""
    write(two_stages + '\n[datasets.books]\ntrain = ["a", "b"]\n', "base.toml")
    child = """
extends = "base.toml"
datasets.books.train = ["c"]
[[stages]]
name = "third"
dataset = "pile"
steps = 5
lr = { schedule = "constant", max = 1e-4 }
[[stages]]
name = "first"
steps = 7
"""
    config = load_config(write(child))

    assert [(stage.name, stage.steps) for stage in config.stages] == [("first", 7), ("second", 50), ("third", 5)]
    assert config.stages[0].lr.max == 1e-3
    assert config.datasets["books"].train == ("c",)


def test_another_schedule_replaces_the_base_lr_table(one_stage, write):
    """Its keys mean something else; the same schedule is merged key by key."""
    write(one_stage, "base.toml")
    stage = 'extends = "base.toml"\n[[stages]]\nname = "first"\n'
    other = load_config(write(stage + 'lr = { schedule = "constant", max = 2e-3 }', "other.toml")).stages[0].lr
    same = load_config(write(stage + "lr = { max = 2e-3 }", "same.toml")).stages[0].lr

    assert other.model_dump() == {"schedule": "constant", "max": 2e-3, "warmup_until": 0}
    assert (same.schedule, same.max, same.min) == ("cosine", 2e-3, 1e-4)


def test_bases_are_found_beside_the_file_that_names_them(one_stage, write, tmp_path, monkeypatch):
    """Not in the working directory, and through more than one level."""
    write(one_stage, "bases/deep/base.toml")
    write('extends = "deep/base.toml"\njob.seed = 5', "bases/middle.toml")
    path = write('extends = "bases/middle.toml"')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    assert load_config(path).job.seed == 5
    assert load_config(Path(os.path.relpath(path))).job.seed == 5


def test_the_same_base_by_two_ways_is_no_circle(one_stage, write):
    """A diamond is legal."""
    write(one_stage, "base.toml")
    write('extends = "base.toml"', "a.toml")
    write('extends = "base.toml"', "b.toml")

    assert load_config(write('extends = ["a.toml", "b.toml"]')).job.name == "tested"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.toml": 'extends = "config.toml"'}, "extends itself: config.toml -> config.toml"),
        (
            {"config.toml": 'extends = "b.toml"', "b.toml": 'extends = "config.toml"'},
            "extends itself: config.toml -> b.toml -> config.toml",
        ),
        ({"config.toml": 'extends = "gone.toml"'}, "gone.toml: cannot be read: No such file or directory"),
        ({"config.toml": "extends = 3"}, "extends: must be a file or a list of files, got 3"),
        ({"config.toml": "extends = ['a', 3]"}, "extends: must be a file or a list of files, got ['a', 3]"),
        ({"config.toml": 'extends = "a\\u0000"'}, "extends: must be a file or a list of files"),
        ({"config.toml": 'extends = "."'}, "cannot be read: Is a directory"),
        ({"config.toml": "[job"}, "not valid TOML: "),
        ({"config.toml": "seed = " + "9" * 5000}, "not valid TOML: "),
        ({"config.toml": "a = [0x" + "f" * 5000 + "]"}, "not valid TOML: integers must fit into 64 bits"),
        ({"config.toml": "a = { b = 9223372036854775808 }"}, "not valid TOML: integers must fit into 64 bits"),
        ({"config.toml": "a = " + "[" * 5000}, "not valid TOML: "),
    ],
)
def test_files_that_cannot_be_read_are_refused(write, tmp_path, files, expected):
    """Circles, missing and damaged files: one message with the file's name."""
    for name, text in files.items():
        write(text, name)
    with pytest.raises(ConfigError) as refusal:
        load_config(tmp_path / "config.toml")

    assert expected in str(refusal.value)
    assert ".toml: " in str(refusal.value) or "cannot be read" in expected


def test_a_file_that_is_no_text_is_refused(tmp_path):
    """Bytes that are not UTF-8."""
    (tmp_path / "config.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"config\.toml: not valid TOML"):
        load_config(tmp_path / "config.toml")


def test_a_nameless_stage_in_a_base_is_a_fault_and_no_crash(one_stage, write):
    """It cannot be merged by name, and is told as what it is."""
    write("[[stages]]\nsteps = 3\n", "base.toml")
    with pytest.raises(ConfigError, match=r"stages\.\[0\]\.name: is missing"):
        load_config(write('extends = "base.toml"\n' + one_stage))


def test_a_fetch_script_is_found_beside_the_file_that_names_it(one_stage, write, tmp_path, monkeypatch):
    """From any working directory, as the files of `extends` are."""
    dataset = '\n[datasets.web]\ntrain = "web"\nsource = { text = "web.jsonl", fetch = "../fetch.py" }\n'
    path = write(one_stage + dataset, "configs/config.toml")
    monkeypatch.chdir(tmp_path)
    here = load_config(path).datasets["web"].source.fetch
    monkeypatch.chdir(tmp_path / "configs")
    there = load_config(Path("config.toml")).datasets["web"].source.fetch

    assert (here, there) == ("fetch.py", "../fetch.py")


# The round trip


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
def test_the_resolved_config_is_the_config(two_stages, load, write, more):
    """dump_config's TOML loads to an equal config, defaults spelt out, and dumps to the same text again."""
    config = load(two_stages + more)
    text = dump_config(config)
    again = load_config(write(text, "resolved.toml"))

    assert again == config
    assert dump_config(again) == text
    assert tomllib.loads(text)["optimizer"]["beta1"] == 0.9
    assert repr(again) == repr(config)  # 1 and 1.0 are told apart


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_config_makes_the_round_trip(path, write):
    """Bases and all: the resolved file stands alone."""
    config = load_config(path)

    assert load_config(write(dump_config(config), "resolved.toml")) == config
    assert "extends" not in read_with_bases(path)


# Nonsense


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
    """All paths into nested tables and lists, the outermost first."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*place, key)
        yield from every_place(inner, (*place, key))


@st.composite
def spoilt_configs(draw, valid):
    """A valid config in which a few places were overwritten, removed or joined by something else."""
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
    """The config that these tables are, read from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text(tomli_w.dumps(raw))
        return load_config(path, overrides)


@given(st.data())
@settings(max_examples=250)
def test_a_spoilt_config_plans_or_is_refused(data):
    """A config or a ConfigError, a plan or a PlanError, whatever was overwritten: never another exception."""
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
def test_any_tables_at_all_are_refused_in_words(raw):
    """No config is that short: ConfigError, nothing else."""
    with pytest.raises(ConfigError, match=r"(problems?|extends|must fit)"):
        load_tables(raw)


@given(
    st.lists(st.sampled_from(["stages", "first", "lr", "replay", "datasets", "job", "max", ""]) | KEYS, min_size=1),
    st.text(),
)
def test_any_override_at_all_is_read_or_refused(parts, text):
    """Whatever is typed after --: a config or a ConfigError."""
    try:
        told = load_tables(VALID, (".".join(parts), text)).stages[0].name
    except ConfigError as refusal:
        told = str(refusal)

    assert told


def test_a_fault_names_its_file_and_line(one_stage, write, load):
    """The last file that has the key; a base, a stage of several, an inline table; none for the command line."""
    write(one_stage.replace("seq_len = 16", "seq_len = 1\nmax_norm = -2.0"), "base.toml")
    text = """extends = "base.toml"
[job]
nmae = "x"
[training]
max_norm = -1.0

[[stages]]
name = "second"
dataset = "pile"
steps = 0
[stages.lr]
schedule = "cosine"
max = -1.0

[[stages]]
name = "third"
dataset = "pile"
steps = 3
lr = { schedule = "cosine", max = 1e-3, mim = 1e-4 }
"""
    base_line = 1 + one_stage.split("seq_len")[0].count("\n")
    with pytest.raises(ConfigError) as refusal:
        load_config(write(text), [("training.local_batch_size", "0")])
    found = dict(re.findall(r"- ([\w.]+): .*?(?: \((\S+\.toml, line \d+)\))?$", str(refusal.value), re.MULTILINE))

    assert found == {
        "job.nmae": "config.toml, line 3",
        "training.seq_len": f"base.toml, line {base_line}",
        "training.max_norm": "config.toml, line 5",
        "training.local_batch_size": "",
        "stages.second.steps": "config.toml, line 10",
        "stages.second.lr.max": "config.toml, line 13",
        "stages.third.lr.mim": "config.toml, line 19",
    }
