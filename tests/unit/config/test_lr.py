"""The LR tables: order of the learning rates, and edge cases that are allowed."""

import pytest
from config_texts import with_lr

from titan_cpt.config.load import load_config


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
    """min <= constant <= max, and max is required unless the stage starts in the constant phase."""
    found = faults(with_lr(head, lr))

    assert len(found) == 1
    assert found[0].startswith("stages.first.lr: ")
    assert expected in found[0]


@pytest.mark.parametrize(("rates", "got"), [("constant = 0.5, min = 0", "0"), ("constant = 0.0", "0.0")])
def test_an_annealing_to_or_from_zero_is_refused(head, faults, rates, got):
    """Annealing is exponential, which is undefined for a learning rate of zero."""
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
def test_edge_cases_of_schedules_are_accepted(head, write, lr):
    """No warm-up, only warm-up, min = 0, no cool-down, no annealing."""
    assert load_config(write(with_lr(head, lr))).stages[0].lr.schedule in lr
