"""Messages for errors in a config: dotted key, value found, values allowed, and the key or value that was meant."""

import json

import pytest
from config_texts import LR, with_lr


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('name = "tested"', 'nmae = "tested"', "job.nmae: unknown key; did you mean 'name'?"),
        ("[training]", "[trainig]", "trainig: unknown key; did you mean 'training'?"),
        ("seq_len", "seq_length", "training.seq_length: unknown key; did you mean 'seq_len'?"),
        ("min =", "mim =", "stages.first.lr.mim: unknown key; did you mean 'min'?"),
        ("fraction", "fractoin", "stages.second.replay.fractoin: unknown key; did you mean 'fraction'?"),
        (
            "fraction = 0.25",
            "fraction = 0.25, form = []",
            "stages.second.replay.form: unknown key; did you mean 'from'?",
        ),
        ('train = "data/pile"', 'trian = "data/pile"', "datasets.pile.trian: unknown key; did you mean 'train'?"),
        ("steps = 100", "stpes = 100", "stages.first.stpes: unknown key; did you mean 'steps'?"),
        ("[model]", "[model]\nxyzzy = 1", "model.xyzzy: unknown key; allowed here are 'family', 'global_interval', 'h"),
    ],
)
def test_the_message_for_an_unknown_key_suggests_the_closest_known_key(two_stages, faults, old, new, expected):
    """At every depth, with stages by name; without a close key it lists all keys of the table."""
    assert any(fault.startswith(expected) for fault in faults(two_stages.replace(old, new, 1)))


def test_a_key_of_another_schedule_is_unknown(head, faults):
    """alpha belongs to infinite_inv_sqrt; a cosine schedule would silently ignore it."""
    (found,) = faults(with_lr(head, 'schedule = "cosine", max = 1.0, alpha = 10.0'))
    expected = "stages.first.lr.alpha: unknown key; allowed here are 'max', 'min', 'schedule', 'warmup_until'"

    assert found == expected


@pytest.mark.parametrize("name", ["source", "domains", "train", "lr"])
def test_hints_for_a_dataset_named_like_a_key_are_the_datasets_keys(one_stage, faults, name):
    """A dataset can have the name of a table, such as source or lr."""
    found = faults(f"{one_stage}\n[datasets.{name}]\ntrian = 'x'\ntrain = 'y'\n")

    assert found == [f"datasets.{name}.trian: unknown key; did you mean 'train'?"]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("training.seq_len", '"long"', "must be an integer, got 'long'"),
        ("training.seq_len", "16.0", "must be an integer, got 16.0"),
        ("training.seq_len", "true", "must be an integer, got True"),
        ("training.seq_len", "1", "must be >= 2, got 1"),
        ("training.global_batch_size", "0", "must be >= 1, got 0"),
        ("training.max_norm", "0.0", "must be > 0, got 0.0"),
        ("training.max_norm", "inf", "must be a finite number, got inf"),
        ("training.mixed_precision_param", '"float16"', "must be one of 'bfloat16', 'float32', got 'float16'"),
        ("training.enable_cpu_offload", "1", "must be true or false, got 1"),
        ("optimizer.beta1", "1.0", "must be in [0, 1), got 1.0"),
        ("optimizer.beta2", "nan", "must be in [0, 1), got nan"),
        ("optimizer.weight_decay", "-0.1", "must be >= 0, got -0.1"),
        ("model.rotary_fraction", "1.5", "must be in (0, 1], got 1.5"),
        ("model.layers", "0", "must be >= 1, got 0"),
        ("job.seed", "-1", "must be in [0, 2**63), got -1"),
        ("job.seed", "[1]", "must be an integer, got [1]"),
        ("job.name", "../../etc", "is the name of a folder"),
        ("job.name", "", "is the name of a folder"),
        ("job.name", ".hidden", "is the name of a folder"),
        ("stages.second.replay.fraction", "1.25", "must be in [0, 1), got 1.25"),
        ("stages.second.replay.fraction", "1.0", "must be in [0, 1), got 1.0"),
        ("stages.second.replay.order", "backwards", "must be one of 'as_trained', 'reshuffled', got 'backwards'"),
        ("stages.first.steps", "0", "must be >= 1, got 0"),
        ("stages.first.lr.max", "0", "must be > 0, got 0"),
        ("stages.first.lr.max", "fast", "must be a number, got 'fast'"),
        ("stages.first.lr.min", "-1e-4", "must be >= 0, got -0.0001"),
        ("stages.first.lr.warmup_until", "1.01", "a float is a fraction of the stage and must be in [0, 1], got 1.01"),
        ("stages.first.lr.warmup_until", "-1", "must not be negative, got -1"),
        ("stages.first.lr.warmup_until", "nan", "must be in [0, 1], got nan"),
        ("stages.first.lr.warmup_until", "true", "must be a fraction of the stage"),
        ("stages.first.lr.warmup_until", "soon", "must be a fraction of the stage (a float in [0, 1]), a step"),
        ("stages.first.lr", "3", "must be a table, got 3"),
        ("stages.first.averaging", '"on"', 'must be a table such as { kind = "mean" }, or "off", got \'on\''),
        ("stages.first.averaging", "true", "must be a table such as"),
        ("datasets.pile.train", "[]", "must be a non-empty string or a non-empty list of them, got []"),
        ("datasets.pile.train", '["a", 3]', "must be a non-empty string or a non-empty list of them"),
        ("datasets.pile", "3", "must be a table, got 3"),
        ("validation.final_window_every", "0", "must be >= 1, got 0"),
    ],
)
def test_the_message_for_a_wrong_value_has_the_key_the_allowed_values_and_the_value_found(
    two_stages, faults, key, value, expected
):
    """One message per key, which begins with the dotted key."""
    found = [fault for fault in faults(two_stages, (key, value)) if fault.startswith(f"{key}: ")]

    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kind": "men"}, "stages.first.averaging.kind: must be one of 'mean', 'ema', 'like_decay', got 'men'"),
        ({"kind": "mean", "last": 1.5}, "stages.first.averaging.last: a float is a fraction of the stage"),
        ({"kind": "mean", "size": 3}, "stages.first.averaging.size: unknown key; allowed here are 'every', 'keep_on'"),
        ({"kind": "mean", "shape": "sqrt"}, 'stages.first.averaging: shape is for kind = "like_decay", got kind ='),
    ],
)
def test_a_fault_in_a_stages_own_average_is_one_message(one_stage, faults, table, message):
    """Not a second one that the table is not "off"; the key is that of the file."""
    written = ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items())
    found = faults(one_stage.replace('dataset = "pile"', f'dataset = "pile"\naveraging = {{ {written} }}', 1))

    assert [fault[: len(message)] for fault in found] == [message]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('name = "tested"', "", "job.name: is missing"),
        ("seq_len = 16", "", "training.seq_len: is missing: Sequence length in tokens"),
        ('dataset = "pile"', "", "stages.first.dataset: is missing"),
        ('schedule = "cosine", ', "", "stages.first.lr.schedule: is missing; give a schedule"),
        ('name = "first"', "", "stages.[0].name: is missing"),
    ],
)
def test_the_message_for_a_missing_key_has_its_location_and_meaning(one_stage, faults, old, new, expected):
    """A stage without a name is identified by its index."""
    found = faults(one_stage.replace(old, new, 1))

    assert found[0].startswith(expected)
    assert len(found) == 1


def test_a_file_without_stages_or_datasets_is_refused(head, faults):
    """Missing, empty, or of a wrong type."""
    assert "stages: is missing; add one [[stages]] for each stage of the training" in faults(head)
    assert "stages: must have at least one entry" in faults("stages = []\n" + head)
    assert faults("datasets = 3\nstages = 3")[-1] == "stages: must be a list, got 3"


def test_a_string_in_place_of_a_list_of_strings_is_shown_as_a_list(one_stage, faults):
    """As it is easily written on the command line."""
    found = faults(one_stage + '[float8]\nfilter_fqns = "mlp"\n')

    assert found == ["float8.filter_fqns: must be a list such as ['mlp'], got 'mlp'"]


def test_the_message_for_an_unknown_schedule_lists_the_known_schedules(head, faults):
    """All seven, and the closest one."""
    (found,) = faults(with_lr(head, 'schedule = "infinite_cosin", max = 1.0'))

    assert found.startswith(
        "stages.first.lr.schedule: must be one of 'cosine', 'linear', 'constant', 'infinite_cosine'"
    )
    assert found.endswith("got 'infinite_cosin'; did you mean 'infinite_cosine'?")


def test_an_error_lists_all_problems_of_a_file(two_stages, faults):
    """Unknown keys, types, ranges, references and budgets in one run of the program, each with its dotted key."""
    text = (
        two_stages.replace('name = "tested"', 'name = "tested"\nnmae = 1')
        .replace("seq_len = 16", "seq_len = 1.5")
        .replace('dataset = "german"', 'dataset = "germn"\ntokens = "1M"')
        .replace("fraction = 0.25", "fraction = 1.25")
    )
    found = faults(text, ("stages.third.steps", "3"))

    assert sorted(fault.partition(": ")[0] for fault in found) == [
        "--stages.third.steps",
        "job.nmae",
        "stages.second",
        "stages.second.dataset",
        "stages.second.replay.fraction",
        "training.seq_len",
    ]


def test_stages_without_names_are_identified_by_their_index(head, faults):
    """They are not reported as two stages of the same name."""
    stage = f'[[stages]]\ndataset = "pile"\nsteps = 1\n{LR}\n'
    found = faults(head + stage + stage)

    assert [fault.split(":")[0] for fault in found] == ["stages.[0].name", "stages.[1].name"]
