"""Command-line overrides by dotted key."""

import pytest

from titan_cpt.errors import ConfigError


def test_an_override_sets_the_key_of_a_stage_by_its_name(two_stages, load):
    """No other key changes."""
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
def test_an_override_is_parsed_as_toml_except_for_keys_that_take_strings(one_stage, load, key, text, value):
    """A job named 7 is named "7"; a bare word needs no quotes; numbers, lists and booleans are TOML values."""
    found = load(one_stage, (key, text))
    for part in key.split("."):
        found = getattr(found, part)

    assert found == value


@pytest.mark.parametrize(
    ("text", "value"), [("0.05", 0.05), ("5", 5), ("1600", 1600), ('"1600"', "1600"), ("3B", "3B"), ("1.0", 1.0)]
)
def test_an_end_point_keeps_its_type_on_the_command_line(one_stage, load, text, value):
    """Fraction, step and tokens are distinguished as in a file."""
    found = load(one_stage, ("stages.first.lr.warmup_until", text)).stages[0].lr.warmup_until

    assert found == value
    assert type(found) is type(value)


def test_an_override_creates_missing_tables(one_stage, load):
    """A replay, a validation table, a whole dataset."""
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


def test_a_pattern_of_weights_keeps_its_dots(one_stage, load):
    """In quotes or not; a stage named lr_scale has keys as any other."""
    patterns = ("embedding.new", '"blocks.0-1"', "blocks.*.mlp")
    found = load(one_stage, *((f"stages.first.lr_scale.{pattern}", "0.5") for pattern in patterns))

    assert found.stages[0].lr_scale == {"embedding.new": 0.5, "blocks.0-1": 0.5, "blocks.*.mlp": 0.5}
    renamed = one_stage.replace('"first"', '"lr_scale"')
    assert load(renamed, ("stages.lr_scale.lr.max", "0.25")).stages[0].lr.max == 0.25


def test_the_last_override_wins(one_stage, load):
    """If a key is given twice."""
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
def test_an_override_of_an_unknown_key_or_stage_is_refused(one_stage, load, key, text, expected):
    """With the closest name; a second line of the text is not parsed as a second key."""
    with pytest.raises(ConfigError) as refusal:
        load(one_stage, (key, text))

    assert any(line.startswith(f"  - {expected}") for line in str(refusal.value).splitlines())


def test_a_stage_named_like_a_key_can_be_overridden(one_stage, load):
    """Its string keys still take text: a dataset named 7 stays a name."""
    text = one_stage.replace('name = "first"', 'name = "lr"')

    assert load(text, ("stages.lr.init", "random")).stages[0].init == "random"
    assert load(text, ("stages.lr.lr.max", "0.5")).stages[0].lr.max == 0.5
