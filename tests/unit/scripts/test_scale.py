"""scripts/scale: the plan's traffic compared with a traced step, and predictions that are marked as such."""

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from titan_cpt.models.registry import SPECS

REPOSITORY = Path(__file__).resolve().parents[3]
SCALE = REPOSITORY / "scripts" / "scale"


@pytest.fixture(scope="module")
def kernels():
    """scripts/scale/kernels.py."""
    sys.path.insert(0, str(SCALE))
    try:
        return importlib.import_module("kernels")
    finally:
        sys.path.remove(str(SCALE))


@pytest.fixture(scope="module")
def predictions():
    """The lines that predict.py prints."""
    return output_of("predict.py").splitlines()


def neox():
    """D = 8, F = 32, V = 64, L = 2."""
    shape = {"layers": 2, "width": 8, "heads": 2, "mlp_width": 32, "vocab_size": 64, "rotary_fraction": 0.5}
    return SPECS["gpt_neox"](family="gpt_neox", **shape)


def llama():
    """D = A = 8, K = 4, F = 16, V = 32, L = 1."""
    shape = {"layers": 1, "width": 8, "heads": 4, "kv_heads": 2, "head_width": 2, "mlp_width": 16, "vocab_size": 32}
    return SPECS["llama"](family="llama", **shape)


def output_of(script):
    """The standard output of a script, which must exit with 0."""
    done = subprocess.run([sys.executable, str(SCALE / script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_plans_traffic_equals_that_of_a_traced_step():
    """Both families under six layouts: every kind of collective to 1 %, or the exit status is 1."""
    lines = output_of("traced.py").splitlines()

    assert len([line for line in lines if "counted" in line]) == 16
    assert float(lines[-1].removeprefix("the largest difference is ").removesuffix("%")) <= 1.0


def test_flops_of_a_tiny_model_equal_those_counted_by_hand(kernels):
    """GPT-NeoX: 2 blocks of 24 x 8 + 8 x 8 + 2 x 8 x 32, head 64 x 8; Llama: 2 x 64 + 2 x 32 + 3 x 128, head 32 x 8."""
    assert kernels.flops(neox(), tokens=16, seq_len=4) == {
        "matrix products": 6 * 2048 * 16,
        "attention, forward": 2 * 2 * 8 * 4 * 16,  # scores and values: 2 x 2 L D S T, half of it masked
        "attention, backward": 5 * 2 * 8 * 4 * 16,
    }
    assert kernels.flops(llama(), tokens=10, seq_len=5)["matrix products"] == 6 * (576 + 256) * 10


def test_bytes_of_a_tiny_model_equal_those_counted_by_hand(kernels):
    """16 tokens in 3 pieces, bf16, 2 blocks of GPT-NeoX; 10 tokens in one piece, one block of Llama."""
    assert kernels.token_bytes(neox(), tokens=16, chunks=3) == {
        "head, weight gradient": (6 + 10 + 10) * 512,
        "head, softmax": 4 * 2 * 64 * 16,
        "activation function": 2 * 2 * 16 * (2 * 32 + 3 * 32),
        "norms, rotary, residuals, bias sums": 2 * 2 * 16 * (96 + 152 + 32),
    }
    again = kernels.token_bytes(neox(), tokens=16, chunks=3, recomputed=True)
    assert again["activation function"] == 2 * 2 * 16 * (4 * 32 + 3 * 32)
    assert kernels.token_bytes(llama(), tokens=10, chunks=1) == {
        "head, weight gradient": 6 * 256,
        "head, softmax": 4 * 2 * 32 * 10,
        "activation function": 2 * 10 * (3 * 16 + 5 * 16),
        "norms, rotary, residuals, bias sums": 2 * 10 * ((64 + 24) + (144 + 24)),
    }


def test_an_update_moves_28_bytes_a_parameter_and_18_to_24_around_it(kernels):
    """1,000 parameters, of which the head's 256 need no cast of their gradient."""
    assert kernels.update_bytes(llama(), parameters=1000) == {
        "AdamW": 28_000,
        "clipping": 8000,
        "norm of the gradients": 4000,
        "cast of the weights": 6000,
        "cast of the gradients": 6 * 744,
    }


def test_three_products_a_matrix_and_a_piece_of_logits_are_the_launches_of_the_trace(kernels):
    """The profiler counted 327 and 474 products: the model counts the same work as the measured step did."""
    assert [
        3 * (trace.spec.layers * sum(len(p.size) == 2 for p in trace.spec.block_parameters()) + trace.chunks)
        for trace in kernels.MEASURED
    ] == [327, 474]


def test_rates_are_recovered_from_steps_that_follow_them(kernels):
    """A trace made from known rates gives these rates, whatever the model."""
    rates = kernels.Rates(7e14, 3e14, 2e14, 3e12, 2e-6, 100.0, 120.0)
    for trace in kernels.MEASURED:
        ms = kernels.step_ms(trace, rates)
        gaps, rest = ms.pop(kernels.LAUNCHES), ms.pop(kernels.NORMS)
        made = dataclasses.replace(
            trace,
            ms=ms,
            busy_ms=sum(ms.values()) + rest,
            wall_ms=sum(ms.values()) + rest + gaps,
            launches=100 * trace.spec.layers,
            eager_tokens_per_s=1e3 * trace.tokens / kernels.eager_ms(trace, rates),
        )
        assert dataclasses.astuple(kernels.fitted([made])) == pytest.approx(dataclasses.astuple(rates))


def test_rates_of_one_model_give_the_other_models_step_to_two_percent(kernels):
    """Compiled and eager, in both directions; the products to 2.5 %."""
    for source, trace in zip(kernels.MEASURED, reversed(kernels.MEASURED), strict=True):
        rates = kernels.fitted([source])
        estimate = kernels.step_ms(trace, rates)
        assert sum(estimate.values()) == pytest.approx(trace.wall_ms, rel=0.02)
        assert kernels.eager_ms(trace, rates) == pytest.approx(1e3 * trace.tokens / trace.eager_tokens_per_s, rel=0.02)
        assert estimate[kernels.PRODUCTS] == pytest.approx(trace.ms[kernels.PRODUCTS], rel=0.025)


def test_predictions_follow_what_was_measured_fitted_assumed_and_compared(predictions):
    """Each kind of figure under its own heading; the errors of the fits precede every prediction."""
    marks = ("MEASURED", "FITTED to one model and TESTED", "FITTED to both", "ASSUMED", "| COMPARED", "| PREDICTED")
    where = [next(i for i, line in enumerate(predictions) if line.startswith(mark)) for mark in marks]

    assert where == sorted(where)


def test_predictions_are_compared_with_published_figures(predictions):
    """torchtitan's four figures for 8B; stretched to fit the 8-GPU figures, the 128-GPU ones are off by under 4 %."""
    published = [line for line in predictions if line.startswith("| Llama 3 8B")]

    assert [line.split("|")[2].strip() for line in published] == ["5,762", "6,667", "5,605", "6,514"]
    assert all(abs(float(line.split("|")[6].split("%")[0])) < 4 for line in published)


def test_the_tables_of_the_documentation_are_printed_by_the_scripts(predictions):
    """Every row of the section in docs/performance.md."""
    text = (REPOSITORY / "docs" / "performance.md").read_text().split("## Scale: traced and predicted")[1]
    rows = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("| ")]

    assert len(rows) > 20
    assert [row for row in rows if row not in predictions] == []
