"""The tables [[stages]]: optional keys are unset by default."""

import pytest
from config_texts import LR, with_stage

from titan_cpt.config.load import dump_config, load_config
from titan_cpt.errors import ConfigError


def test_a_stage_without_optional_keys_leaves_them_unset(head, write):
    """Only steps or tokens, a dataset and a learning rate are needed."""
    stage = load_config(write(with_stage(head, f'dataset = "pile"\nsteps = 1\n{LR}'))).stages[0]

    assert stage.model_dump(exclude_none=True).keys() == {"name", "dataset", "steps", "optimizer_state", "lr"}


def test_a_batch_size_is_a_number_or_a_ramp_in_any_order(head, write):
    """The keys stay as they were written."""
    text = with_stage(head, f'dataset = "pile"\nsteps = 1\n{LR}\nglobal_batch_size = {{ "5B" = 1024, "0" = 256 }}')

    assert load_config(write(text)).stages[0].global_batch_size == {"5B": 1024, "0": 256}
    assert load_config(write(text), [("stages.first.global_batch_size", "64")]).stages[0].global_batch_size == 64


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0", "must be a number of sequences, 1 or more, or a ramp such as"),
        ("2.5", "got 2.5"),
        ('{ "0" = 4, "1B" = "8" }', "got '8' at '1B' tokens"),
        ('{ "5B" = 1024 }', "a ramp needs the key \"0\", the batch size at the beginning, got '5B'"),
        ("{}", 'a ramp needs the key "0"'),
        ('{ "0" = 4, "soon" = 8 }', "the keys of a ramp are tokens of the stage: must be a number of tokens"),
        ('{ "0" = 4, "1B" = 8, "1000M" = 9 }', "'1B' and '1000M' are the same number of tokens: remove one of them"),
    ],
)
def test_other_batch_sizes_are_refused(head, faults, value, message):
    """Each with what was found and what is allowed."""
    found = faults(with_stage(head, f'dataset = "pile"\nsteps = 1\n{LR}\nglobal_batch_size = {value}'))

    assert len(found) == 1
    assert found[0].startswith("stages.first.global_batch_size: ")
    assert message in found[0]


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ("{ }", "is empty: set base"),
        ("{ base = 1.0 }", "rope.base: must be > 1"),
        ("{ base = inf }", "rope.base: must be a finite number"),
        ("{ factor = 4.0 }", 'factor needs a kind: add kind = "yarn" or kind = "llama3"'),
        ('{ kind = "ntk" }', "rope.kind: must be"),
        ('{ kind = "yarn" }', 'kind = "yarn" needs factor and original_seq_len; to extend 4096 trained tokens'),
        ('{ kind = "llama3", factor = 2.0 }', "needs original_seq_len; "),
        ('{ kind = "linear" }', 'kind = "linear" needs factor, such as'),
        (
            '{ kind = "linear", factor = 2.0, original_seq_len = 8 }',
            '"linear" has no original_seq_len; allowed are fac',
        ),
        ('{ kind = "none", factor = 2.0 }', 'kind = "none" removes the scaling and has no factor'),
        (
            '{ kind = "llama3", factor = 2.0, original_seq_len = 8, beta_slow = 2.0 }',
            'kind = "llama3" has no beta_slow; allowed are factor, original_seq_len, low_freq_factor, high',
        ),
        ("{ theta = 5e5 }", "rope.theta: unknown key"),
    ],
)
def test_a_rope_with_missing_or_foreign_keys_is_refused(head, write, rope, said):
    """The message says which keys belong together."""
    with pytest.raises(ConfigError) as refusal:
        load_config(write(with_stage(head, f'dataset = "pile"\nsteps = 1\n{LR}\nrope = {rope}')))

    assert said in str(refusal.value)


def test_a_rope_is_set_on_the_command_line_too(head, write):
    """By the stage's name."""
    path = write(with_stage(head, f'dataset = "pile"\nsteps = 1\n{LR}'))
    stage = load_config(path).stages[0]
    rope = load_config(path, [(f"stages.{stage.name}.rope.base", "500000")]).stages[0].rope

    assert (rope.base, rope.kind) == (500_000.0, None)


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        ('{ of = ["pile"] }', 'needs by = "tokens", got None'),
        ('{ of = ["pile"], by = "size" }', "got 'size'"),
        ('{ of = ["pile", "pile"], by = "tokens" }', "of names a dataset twice: 'pile', 'pile'"),
        ('{ of = [], by = "tokens" }', "must be a non-empty string or a non-empty list"),
        ('{ of = ["pile"], by = "tokens", temperature = 2 }', "temperature must be a number from 0 to 1, got 2"),
        ('{ of = ["pile"], by = "tokens", max_epochs = 0 }', "max_epochs must be a number above 0, got 0"),
        ('{ of = ["pile"], by = "tokens", epochs = 4 }', "unknown key 'epochs' of a mixture by tokens"),
    ],
)
def test_a_faulty_mixture_by_tokens_is_refused(head, faults, mixture, said):
    """Each with what was found and what is allowed."""
    (found,) = faults(with_stage(head, f"dataset = {mixture}\nsteps = 1\n{LR}"))

    assert found.startswith("stages.first.dataset: ")
    assert said in found


def test_a_mixture_by_tokens_is_written_as_it_was_read(head, write):
    """Its datasets are checked; `of` with a weight is a dataset."""
    text = 'dataset = { of = ["pile", "absent"], by = "tokens", temperature = 0.5, max_epochs = 4 }'
    with pytest.raises(ConfigError, match=r"stages.first.dataset: there is no \[datasets.absent\]"):
        load_config(write(with_stage(head, f"{text}\nsteps = 1\n{LR}")))
    present = text.replace(', "absent"', "")
    config = load_config(write(with_stage(head, f"{present}\nsteps = 1\n{LR}")))
    path = write(dump_config(config))

    assert 'by = "tokens"' in path.read_text()
    assert load_config(path) == config
