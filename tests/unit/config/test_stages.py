"""The tables [[stages]]: optional keys are unset by default."""

import pytest
from config_texts import LR, with_stage

from titan_cpt.config.load import load_config


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
