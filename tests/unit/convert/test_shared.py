"""Schedules that are exact or None, end points that are not whole, and data that must be there for a plan."""

from fractions import Fraction

from titan_cpt.convert.conversion import Conversion
from titan_cpt.convert.shared import cosine_lr, end_point, exactly, linear_lr, set_missing_data, set_model


def test_end_points_are_whole_steps_or_a_text():
    assert [end_point(Fraction(3)), end_point(Fraction(3, 2))] == [3, "1.5 steps"]
    assert exactly(0.1) * 10 == 1


def test_a_cosine_that_no_schedule_here_has_is_none():
    assert cosine_lr(peak=1.0, low=0.0, warmup=Fraction(1), decay_end=Fraction(5), steps=10) is None
    assert cosine_lr(peak=1.0, low=0.1, warmup=Fraction(1), decay_end=Fraction(20), steps=10) is None


def test_a_line_that_the_last_step_cuts_off_ends_where_it_is_then():
    table = linear_lr(peak=1.0, low=0.0, warmup=Fraction(0), decay_end=Fraction(20), steps=10)
    assert table is not None
    assert table["min"] == 0.5
    assert linear_lr(peak=1.0, low=0.0, warmup=Fraction(0), decay_end=Fraction(5), steps=10) is None


def test_without_data_a_placeholder_is_a_decision():
    out = Conversion("x", {})
    set_missing_data(out)
    assert out.values == {"datasets.data.train": "data/data/train", "stage.dataset": "data"}
    assert len(out.decisions) == 2


def test_a_vocabulary_is_left_to_the_size_unless_padding_would_change_it():
    fields = {"layers": 32, "width": 4096, "heads": 32, "kv_heads": 32, "head_width": 128, "mlp_width": 11_008}
    for vocabulary, tensor_parallel, written in (
        (32_000, False, None),
        (32_000, True, 32_000),
        (32_001, False, 32_001),
    ):
        out = Conversion("x", {})
        set_model(out, "llama", fields | {"vocab_size": vocabulary}, of=[], tensor_parallel=tensor_parallel)
        assert out.values.get("model.vocab_size") == written
        assert out.values["model.size"] == "llama2-7b"
