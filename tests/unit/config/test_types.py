"""End points, token budgets and mixtures of datasets as values in the TOML file."""

import pytest
from config_texts import LR, with_lr, with_stage

from titan_cpt.config.load import load_config


@pytest.mark.parametrize(
    ("text", "value"), [("0.25", 0.25), ("0.0", 0.0), ("1.0", 1.0), ("0", 0), ("50", 50), ('"1600"', "1600")]
)
def test_an_end_point_is_a_fraction_a_step_or_tokens(head, write, text, value):
    """A float is a fraction, an integer a step, a string tokens; the type is kept, because 1.0 is not 1."""
    lr = f'schedule = "cosine", max = 1.0, min = 0.1, warmup_until = {text}'
    read = load_config(write(with_lr(head, lr))).stages[0].lr.warmup_until

    assert read == value
    assert type(read) is type(value)


def test_a_stage_trains_on_a_dataset_or_a_weighted_mixture(head, write):
    """A name, or a table of weights, as the joint-training baseline has it."""
    stage = f"dataset = {{ pile = 0.5, german = 1 }}\nsteps = 1\n{LR}"

    assert load_config(write(with_stage(head, stage))).stages[0].dataset == {"pile": 0.5, "german": 1}


@pytest.mark.parametrize("tokens", ["0", '"0B"', '"1.5"', "1.5", "true", '"3 billion"', "-5"])
def test_a_token_budget_is_a_positive_whole_number(head, faults, tokens):
    """As an integer or a string with a suffix."""
    found = faults(with_stage(head, f'dataset = "pile"\ntokens = {tokens}\n{LR}'))

    assert found[0].startswith("stages.first.tokens: must be a ")
    assert len(found) == 1
