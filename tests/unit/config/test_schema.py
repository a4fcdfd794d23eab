"""The schema of the TOML: defaults, what is refused and in which words, every fault at once."""

import re

import pytest
from pydantic import BaseModel, ValidationError

from titan_cpt.common.numbers import parse_tokens
from titan_cpt.config import schema
from titan_cpt.config.load import load_config
from titan_cpt.errors import ConfigError

LR = 'lr = { schedule = "cosine", max = 1e-3, min = 1e-4 }'

EXAMPLES = {  # a legal value of each key that some later part may carry out
    "model.family": "llama",
    "model.tie_embeddings": "true",
    "training.enable_cpu_offload": "true",
    "parallelism.data_parallel_replicate_degree": "2",
    "parallelism.tensor_parallel_degree": "2",
    "parallelism.enable_async_tensor_parallel": "true",
    "parallelism.disable_loss_parallel": "true",
    "parallelism.pipeline_parallel_degree": "2",
    "parallelism.context_parallel_degree": "2",
    "activation_checkpoint.mode": "full",
    "compile.enable": "true",
    "float8.recipe_name": "rowwise",
    "float8.enable_fsdp_float8_all_gather": "true",
    "profiling.enable_profiling": "true",
}


@pytest.fixture
def faults(write):
    """faults(text, *overrides): the lines of the refusal, without their bullets and without file and line."""

    def faults(text, *overrides):
        with pytest.raises(ConfigError) as refusal:
            load_config(write(text), overrides)
        head, *lines = str(refusal.value).splitlines()
        assert head.endswith(f"config.toml: {len(lines)} problem{'s' * (len(lines) > 1)}")
        return [re.sub(r" \(config\.toml(, line \d+)?\)$", "", line.removeprefix("  - ")) for line in lines]

    return faults


def with_stage(head, stage):
    return f'{head}\n[[stages]]\nname = "first"\n{stage}\n'


def with_lr(head, lr):
    return with_stage(head, f'dataset = "pile"\nsteps = 100\nlr = {{ {lr} }}')


# What is accepted


def test_thirty_lines_are_a_config_and_the_defaults_are_the_papers(one_stage, write):
    """AdamW 0.9 / 0.95 / 1e-8 / 0.1, clipping at 1.0, 1 % warm-up, optimizer reset: METHOD.md sections 2 and 4."""
    config = load_config(write(one_stage))
    adamw = config.optimizer

    assert len(one_stage.strip().splitlines()) <= 30
    assert (adamw.beta1, adamw.beta2, adamw.eps, adamw.weight_decay) == (0.9, 0.95, 1e-8, 0.1)
    assert config.training.max_norm == 1.0
    assert config.stages[0].optimizer_state == "reset"
    assert load_config(write(one_stage.replace(", min = 1e-4", ""))).stages[0].lr.warmup_until == 0.01
    assert (config.tokenizer.path, config.job.output_dir, config.job.seed) == ("bytes", "outputs", 0)
    assert (config.validation.interval, config.checkpoint.interval) == (100, 500)


def test_a_config_is_frozen(one_stage, write):
    """What was read is what runs: nobody can set a number later."""
    config = load_config(write(one_stage))

    with pytest.raises(ValidationError, match="frozen"):
        config.stages[0].lr.max = 1.0


def test_every_key_is_documented():
    """Each key of each table has a docstring: errors and the reference quote it."""
    models = [m for m in vars(schema).values() if isinstance(m, type) and issubclass(m, BaseModel)]
    bare = [
        f"{model.__name__}.{name}"
        for model in models
        if model is not schema.Config
        for name, field in model.model_fields.items()
        if name != "schedule" and not (field.description or "").strip()
    ]

    assert len(models) > 20
    assert bare == []


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("300B", 300_000_000_000),
        ("2.5M", 2_500_000),
        ("1_000_000", 1_000_000),
        ("1.5K", 1500),
        ("3 T", 3 * 10**12),
        (" 7 ", 7),
        ("0.001K", 1),
    ],
)
def test_token_strings_are_powers_of_a_thousand(text, tokens):
    """300B is 300 x 10^9, exactly."""
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    "text", ["", "B", "300b", "3e9", "-3B", "1.5", "0.0001K", "3BB", "3.B", "1,000", "9000000000T"]
)
def test_other_token_strings_are_refused(text):
    """A small letter, an exponent, a sign, a fraction of a token: none is guessed at."""
    with pytest.raises(ValueError, match=r"must be a (whole )?number of tokens"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("text", "value"), [("0.25", 0.25), ("0.0", 0.0), ("1.0", 1.0), ("0", 0), ("50", 50), ('"1600"', "1600")]
)
def test_end_points_are_shares_steps_or_tokens(head, write, text, value):
    """A float is a share, an integer a step, a string tokens; the kind is kept, for 1.0 is not 1."""
    lr = f'schedule = "cosine", max = 1.0, min = 0.1, warmup_until = {text}'
    read = load_config(write(with_lr(head, lr))).stages[0].lr.warmup_until

    assert read == value
    assert type(read) is type(value)


def test_a_dataset_is_a_name_or_a_table_of_weights(head, write):
    """The union baseline of DESIGN.md section 3."""
    stage = f"dataset = {{ pile = 0.5, german = 1 }}\nsteps = 1\n{LR}"

    assert load_config(write(with_stage(head, stage))).stages[0].dataset == {"pile": 0.5, "german": 1}


# Unknown keys


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
        ("[model]", "[model]\nxyzzy = 1", "model.xyzzy: unknown key; allowed here are 'family', 'head_width', 'heads'"),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest_known_one(two_stages, faults, old, new, expected):
    """At every depth, stages by name; without a near key all of them are listed."""
    assert any(fault.startswith(expected) for fault in faults(two_stages.replace(old, new, 1)))


def test_the_keys_of_one_schedule_are_unknown_to_another(head, faults):
    """alpha belongs to infinite_inv_sqrt: a cosine that were given one would silently ignore it."""
    (found,) = faults(with_lr(head, 'schedule = "cosine", max = 1.0, alpha = 10.0'))
    expected = "stages.first.lr.alpha: unknown key; allowed here are 'max', 'min', 'schedule', 'warmup_until'"

    assert found == expected


@pytest.mark.parametrize("name", ["source", "domains", "train", "lr"])
def test_a_dataset_may_be_named_like_a_key(one_stage, faults, name):
    """The hints are still the dataset's own keys."""
    found = faults(f"{one_stage}\n[datasets.{name}]\ntrian = 'x'\ntrain = 'y'\n")

    assert found == [f"datasets.{name}.trian: unknown key; did you mean 'train'?"]


# Wrong types and ranges


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("training.seq_len", '"long"', "must be an integer, got 'long'"),
        ("training.seq_len", "16.0", "must be an integer, got 16.0"),
        ("training.seq_len", "true", "must be an integer, got True"),
        ("training.seq_len", "1", "must be >= 2, got 1"),
        ("training.global_batch_size", "0", "must be >= 1, got 0"),
        ("training.max_norm", "0.0", "must be > 0, got 0.0"),
        ("training.max_norm", "inf", "finite number, got inf"),
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
        ("datasets.pile.train", "[]", "must be a non-empty string or a non-empty list of them, got []"),
        ("datasets.pile.train", '["a", 3]', "must be a non-empty string or a non-empty list of them"),
        ("datasets.pile", "3", "must be a table, got 3"),
        ("validation.final_window_every", "0", "must be >= 1, got 0"),
    ],
)
def test_a_wrong_value_is_told_with_what_is_allowed(two_stages, faults, key, value, expected):
    """The dotted key, what is allowed, what was found."""
    found = [fault for fault in faults(two_stages, (key, value)) if fault.startswith(f"{key}: ")]

    assert len(found) == 1
    assert expected in found[0]


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
def test_a_missing_key_is_told_by_its_place(one_stage, faults, old, new, expected):
    """With what the key means; a stage without a name goes by its number."""
    found = faults(one_stage.replace(old, new, 1))

    assert found[0].startswith(expected)
    assert len(found) == 1


def test_a_file_without_stages_or_datasets_says_so(head, faults):
    """Empty lists and tables are not a run."""
    assert "stages: is missing" in faults(head)
    assert "stages: must have at least one entry" in faults("stages = []\n" + head)
    assert faults("datasets = 3\nstages = 3")[-1] == "stages: must be a list, got 3"


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ('steps = 10\ntokens = "1M"', "must have exactly one of steps and tokens, got both"),
        ("", "must have exactly one of steps and tokens, got neither"),
    ],
)
def test_a_stage_has_one_budget(head, faults, budget, expected):
    """Steps or tokens, never both and never none."""
    assert faults(with_stage(head, f'dataset = "pile"\n{budget}\n{LR}')) == [f"stages.first: {expected}"]


@pytest.mark.parametrize("tokens", ["0", '"0B"', '"1.5"', "1.5", "true", '"3 billion"', "-5"])
def test_a_budget_is_one_token_or_more(head, faults, tokens):
    """Whole and positive, as a number or a string."""
    found = faults(with_stage(head, f'dataset = "pile"\ntokens = {tokens}\n{LR}'))

    assert found[0].startswith("stages.first.tokens: must be a ")
    assert len(found) == 1


# Learning rates


@pytest.mark.parametrize(
    ("lr", "expected"),
    [
        ('schedule = "cosine", max = 1e-4, min = 1e-3', "min must not be above max (0.0001), got 0.001"),
        (
            'schedule = "infinite_cosine", max = 1e-4, constant = 1e-3, cooldown_until = 0.5, constant_until = 0.8',
            "above",
        ),
        ('schedule = "infinite_cosine", constant = 1e-3, cooldown_until = 0.5, constant_until = 0.8', "max is missing"),
        (
            'schedule = "infinite_inv_sqrt", constant = 1e-3, min = 2e-3, '
            "warmup_until = 0, cooldown_until = 0, constant_until = 0.8",
            "min must not be above constant (0.001), got 0.002",
        ),
    ],
)
def test_learning_rates_out_of_order_are_refused(head, faults, lr, expected):
    """min <= constant <= max, and a max wherever one is climbed to."""
    found = faults(with_lr(head, lr))

    assert len(found) == 1
    assert found[0].startswith("stages.first.lr: ")
    assert expected in found[0]


@pytest.mark.parametrize(("rates", "got"), [("constant = 0.5, min = 0", "0"), ("constant = 0.0", "0.0")])
def test_an_annealing_to_or_from_zero_is_refused(head, faults, rates, got):
    """An exponential has no zero."""
    lr = f'schedule = "infinite_cosine", max = 1.0, cooldown_until = 0.5, constant_until = 0.8, {rates}'
    (found,) = faults(with_lr(head, lr))

    assert found.endswith(f"must be > 0, got {got}")


@pytest.mark.parametrize(
    "lr",
    [
        'schedule = "cosine", max = 1.0, min = 0, warmup_until = 0',
        'schedule = "linear", max = 1.0, min = 0.0, warmup_until = 1.0',
        'schedule = "constant", max = 1.0',
        'schedule = "wsd", max = 1.0, min = 0, decay_from = 0.8, decay = "sqrt"',
        'schedule = "inv_sqrt", max = 1.0, min = 0, timescale = "1K"',
        'schedule = "infinite_cosine", constant = 1.0, warmup_until = 0, cooldown_until = 0.0, constant_until = 1.0',
        'schedule = "infinite_inv_sqrt", max = 1, constant = 0.5, cooldown_until = 9, constant_until = "3B", alpha = 3',
    ],
)
def test_edges_that_must_work_are_accepted(head, write, lr):
    """Warm-up 0 or all of it, min 0, no cool-down, no annealing: METHOD.md section 2, trap (ii)."""
    assert load_config(write(with_lr(head, lr))).stages[0].lr.schedule in lr


def test_an_unknown_schedule_is_told_with_the_known_ones(head, faults):
    """All seven, and the nearest."""
    (found,) = faults(with_lr(head, 'schedule = "infinite_cosin", max = 1.0'))

    assert found.startswith(
        "stages.first.lr.schedule: must be one of 'cosine', 'linear', 'constant', 'infinite_cosine'"
    )
    assert found.endswith("got 'infinite_cosin'; did you mean 'infinite_cosine'?")


# What must fit together


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ('train = "x"\n[datasets.extra.domains.a]\ntrain = "a"\nweight = 1', "give either train or domains, not both"),
        ("", "has no tokens: give train or domains"),
        ('train = ["a", "b"]\nsource = { text = "t" }', "with source, train must be one prefix"),
        ('train = "a"\nsource = { text = "t", holdout = 0.1 }', "must be the train prefix followed by"),
    ],
)
def test_a_dataset_has_one_origin(one_stage, faults, table, expected):
    """Tokens from train or from domains; text prepared into exactly one prefix."""
    (found,) = faults(f"{one_stage}\n[datasets.extra]\n{table}\n")

    assert found.startswith("datasets.extra: ")
    assert expected in found


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (
            "stages.second.dataset",
            "germn",
            "stages.second.dataset: there is no [datasets.germn]; did you mean 'german'?",
        ),
        ("stages.second.dataset", '["german"]', "stages.second.dataset: must be a name or a table of weights"),
        ("stages.second.dataset", "{ german = 0.0 }", "stages.second.dataset: the weight of 'german' must be a number"),
        (
            "stages.second.replay.from",
            "[]",
            "stages.second.replay.from: must be a non-empty string",
        ),
        (
            "stages.second.replay.from",
            "books",
            "stages.second.replay.from: there is no [datasets.books]; there are 'pile'",
        ),
        ("stages.second.name", "first", "stages.first.name: two stages have this name"),
        ("stages.second.name", "a/b", "stages.a/b.name: must be letters, digits, '_' and '-'"),
        *(
            ("stages.second.name", name, f"stages.{name}.name: is reserved for the folder {name}/ of every run")
            for name in ("tb", "evaluations", "profile", "report", "logs")
        ),
        ("stages.second.name", "..", "stages.'..'.name: must be letters, digits, '_' and '-'"),
        ("training.steps", "3", "training.steps: unknown key; each of the [[stages]] has its own steps or tokens, lr"),
        ("optimizer.lr", "3e-4", "optimizer.lr: unknown key; each of the [[stages]] has its own steps or tokens, lr"),
        ("stages.first.init", "previous", "stages.first.init: the first stage has no previous one"),
        ("stages.first.init", "stage:second", "stages.first.init: must name an earlier stage"),
        ("stages.second.init", "stage:frist", "stages.second.init: must name an earlier stage"),
        ("stages.second.init", "stage:first@end", "stages.second.init: must name an earlier stage"),
        ("stages.second.init", "scratch", "stages.second.init: must be one of previous, random"),
        ("stages.second.init", "checkpoint:", "stages.second.init: must be one of previous, random"),
        ("stages.second.init", "hf:", "stages.second.init: must be one of previous, random, stage:NAME"),
        (
            "stages.first.optimizer_state",
            "keep",
            "stages.first.optimizer_state: init = 'random' has no optimizer state to keep",
        ),
        (
            "tokenizer.train",
            '{ dataset = "pile", vocab_size = 300 }',
            "tokenizer.train.dataset: [datasets.pile] has no",
        ),
        (
            "tokenizer.train",
            '{ dataset = "pike", vocab_size = 300 }',
            "tokenizer.train.dataset: there is no [datasets.pi",
        ),
        ("tokenizer.train", '{ dataset = "pile", vocab_size = 256 }', "tokenizer.train.vocab_size: must be in [257, "),
    ],
)
def test_references_that_lead_nowhere_are_refused(two_stages, faults, key, value, expected):
    """Datasets, stages, weights and tokenizers are looked up before anything runs."""
    found = faults(two_stages, (key, value))

    assert any(fault.startswith(expected) for fault in found), found


def test_a_dataset_with_validation_alone_can_be_measured_and_not_trained_on(one_stage, write, faults):
    """It loads; a stage or a replay that names it is refused."""
    text = one_stage + '\n[datasets.books]\nvalidation = "data/books"\n'
    expected = "[datasets.books] has no tokens to train on: give it train or domains"

    assert load_config(write(text)).datasets["books"].validation == ("data/books",)
    assert faults(text, ("stages.first.dataset", "books")) == [f"stages.first.dataset: {expected}"]


# All at once


def test_all_faults_of_a_file_are_told_at_once(two_stages, faults):
    """Keys, types, ranges, references and budgets, each with its dotted path: one run of the program finds them all."""
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


def test_two_nameless_stages_are_told_apart(head, faults):
    """By their numbers, and neither is said to be named like the other."""
    stage = f'[[stages]]\ndataset = "pile"\nsteps = 1\n{LR}\n'
    found = faults(head + stage + stage)

    assert [fault.split(":")[0] for fault in found] == ["stages.[0].name", "stages.[1].name"]
