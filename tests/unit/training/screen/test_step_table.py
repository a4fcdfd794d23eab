"""The table of steps: every row fits 80 columns and has all of its numbers."""

import math

from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.training.screen.step_table import ROWS_BETWEEN_HEADINGS, StepTable

NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
KEYS = ("loss_nats_per_token", "grad_norm", "lr", "tokens_per_s", "mfu", "memory_gib")


@given(
    numbers=st.tuples(*[NUMBERS] * len(KEYS)),
    step=st.integers(0, 10**12),
    etas=st.tuples(NUMBERS, NUMBERS),
)
def test_no_row_is_wider_than_80_columns(numbers, step, etas):
    """Whatever the numbers are; columns are two or more spaces apart, so none is cut or grown together."""
    line = {"step": step, **dict(zip(KEYS, numbers, strict=True))}
    heading, row = StepTable().lines(line, *etas)

    assert max(len(heading), len(row)) <= 80
    assert len(row.split()) == (8 if math.isnan(line["mfu"]) else 9)


def test_a_model_of_ten_billion_parameters_and_a_debug_model_fill_the_same_columns():
    """With MFU on known GPUs, without it elsewhere."""
    large = {"step": 132_366, "loss_nats_per_token": 1.98768, "grad_norm": 0.1234, "lr": 1.2e-4, "mfu": 0.412}
    large |= {"tokens_per_s": 1_234_567.0, "memory_gib": 71.26}
    small = {"step": 7, "loss_nats_per_token": 5.5, "grad_norm": 12.0, "lr": 3e-3, "mfu": math.nan}
    small |= {"tokens_per_s": 987.4, "memory_gib": 0.3}

    assert StepTable().lines(large, 86_400 * 2, 1e9) == [
        "     step     loss  grad norm        LR   memory  tokens/s   MFU     ETA  of run",
        "  132,366   1.9877      0.123  1.20e-04  71.3GiB     1.23M   41%   2d00h  >9999d",
    ]
    assert StepTable().lines(small, 61, 3600) == [
        "     step     loss  grad norm        LR   memory  tokens/s     ETA  of run",
        "        7   5.5000       12.0  3.00e-03  0.30GiB       987   1m01s   1h00m",
    ]


def test_the_heading_is_repeated():
    """Every 20 rows, so that it is on a terminal of 24."""
    table = StepTable()
    line = {"step": 1, "loss_nats_per_token": 1.0, "grad_norm": 1.0, "lr": 1.0, "mfu": math.nan, "tokens_per_s": 1.0}
    counts = [len(table.lines(line, 1.0, 1.0)) for _ in range(45)]

    assert [index for index, count in enumerate(counts) if count == 2] == [0, ROWS_BETWEEN_HEADINGS, 40]
