"""metrics.jsonl, TensorBoard and the speed: what is written, when, and what is read back after a crash."""

import json
import math
from functools import partial

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from titan_cpt.common.metrics_file import open_metrics_file
from titan_cpt.training import metrics
from titan_cpt.training.metrics import MetricsLog, SumsBySource, peak_flops

STEP_KEYS = [
    "kind",
    "stage",
    "step",
    "run_step",
    "tokens",
    "replayed_tokens",
    "lr",
    "loss_nats_per_token",
    "grad_norm",
    "tokens_per_s",
    "mfu",
    "memory_gib",
    "batch_hash",
]


def log_in(run, *, tensorboard=None, writing=True, peak=600.0):
    return MetricsLog(run, writing=writing, tensorboard=tensorboard, peak_flops=peak)


def numbers(step, *, stage="a", lr=1e-3):
    given = {"stage": stage, "step": step, "run_step": 100 + step, "tokens": 64 * step, "replayed_tokens": 16, "lr": lr}
    return {**given, "batch_hash": f"{step:016x}"}


def keep(log, step, *, loss=2.5, grad_norm=0.5, tokens=64, flops_per_token=6):
    measured = {"loss": torch.tensor(loss), "grad_norm": torch.tensor(grad_norm)}
    log.step(numbers(step), **measured, tokens=tokens, flops_per_token=flops_per_token)


def test_losses_by_source_are_means_over_all_ranks_and_only_finite(tmp_path):
    """Two ranks with equal sums: 12 nats in 4 + 4 targets. The NaN's tokens count; a skipped batch has no sources."""
    names = (("pile", False), ("wiki.de", False), ("pile", True), ("unused", False))
    sums_S2 = torch.tensor([[6.0, 4.0], [math.nan, 2.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    log = MetricsLog(
        tmp_path,
        writing=True,
        tensorboard=partial(SummaryWriter, str(tmp_path / "tb"), ""),
        peak_flops=600.0,
        sum_over_ranks=lambda share: 2 * share,
    )
    for step, by_source in ((1, SumsBySource(sums_S2, names)), (2, None)):
        measured = {"loss": torch.tensor(2.0), "grad_norm": torch.tensor(0.5), "flops_per_token": 6}
        log.step(numbers(step), **measured, tokens=64, by_source=by_source)
    log.flush()
    log.close()
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())

    assert first["loss_by_source"] == {"pile": 1.5}
    assert first["tokens_by_source"] == {"pile": 8, "wiki.de": 4}
    assert (first["replay_loss_by_source"], first["replay_tokens_by_source"]) == ({"pile": 1.0}, {"pile": 2})
    assert not any("by_source" in key for key in second)
    curves = curves_in(tmp_path / "tb")
    assert curves["train_by_source/pile"] == [(101, 1.5)]
    assert curves["replay_by_source/pile"] == [(101, 1.0)]


def validation(stage, step, dataset, loss, forgetting=None):
    line = {"stage": stage, "step": step, "dataset": dataset, "loss_nats_per_token": loss, "bits_per_byte": loss * 2}
    return {**line, "perplexity": math.exp(loss), "forgetting_nats_per_token": forgetting}


def curves_in(folder):
    """Step and value of every point, read by TensorBoard."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def written(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_step_has_a_line_of_its_own_with_its_own_numbers(tmp_path):
    """Three steps kept and one flush: three lines, in order, keys in order, `kind` first; nothing before the flush."""
    log = log_in(tmp_path)
    for step in (1, 2, 3):
        keep(log, step, loss=1.0 / step, grad_norm=float(step))
    before = written(tmp_path)
    returned = log.flush()
    lines = written(tmp_path)
    log.close()

    assert before == []
    assert [list(line) for line in lines] == [STEP_KEYS] * 3
    assert [line["kind"] for line in lines] == ["train"] * 3
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["loss_nats_per_token"] for line in lines] == [1.0, 0.5, pytest.approx(1 / 3, rel=1e-7)]
    assert [line["grad_norm"] for line in lines] == [1.0, 2.0, 3.0]
    assert [line["batch_hash"] for line in lines] == ["0" * 15 + digit for digit in "123"]
    assert [line["loss_nats_per_token"] for line in returned] == [line["loss_nats_per_token"] for line in lines]


def test_steps_are_written_once(tmp_path):
    """A second flush writes nothing."""
    log = log_in(tmp_path)
    keep(log, 1)
    log.flush()
    again = log.flush()
    log.close()

    assert again == []
    assert len(written(tmp_path)) == 1


def test_speed_is_the_tokens_of_the_steps_over_their_seconds(tmp_path, monkeypatch):
    """Four seconds of training for 2 x 64 tokens, after ten of validation that do not count: 32 tokens/s. At 6 FLOPs a
    token that is 192 FLOP/s, 0.32 of a peak of 600."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    log = log_in(tmp_path)
    now[0] = 10.0
    log.restart_clock()
    keep(log, 1)
    keep(log, 2)
    now[0] = 14.0
    lines = log.flush()
    now[0] = 16.0
    keep(log, 3)
    later = log.flush()
    log.close()

    assert [(line["tokens_per_s"], line["mfu"]) for line in lines] == [(32.0, pytest.approx(0.32))] * 2
    assert later[0]["tokens_per_s"] == 32.0  # 64 tokens in the two seconds since the last flush
    assert all(0.01 < line["memory_gib"] < 100 for line in lines)


def test_on_cuda_a_step_has_the_allocators_reserved_and_active_memory(tmp_path, monkeypatch):
    """3 GiB reserved, of which tensors used 2 at most; TensorBoard has them under torchtitan's names too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"active_bytes.all.peak": 2 * 2**30})
    log = log_in(tmp_path, tensorboard=partial(SummaryWriter, str(tmp_path / "tb"), ""))
    keep(log, 1)
    (line,) = log.flush()
    log.close()
    curves = curves_in(tmp_path / "tb")

    assert (line["memory_gib"], line["memory_active_gib"]) == (3.0, 2.0)
    assert [curves[f"memory/max_{name}(GiB)"] for name in ("reserved", "active")] == [[(101, 3.0)], [(101, 2.0)]]
    assert "throughput/memory_active_gib" not in curves


def test_numbers_that_are_not_finite_are_null_so_that_the_line_is_json(tmp_path):
    """JSON has no NaN; the lines returned to the training loop have it."""
    log = log_in(tmp_path, peak=math.nan)
    keep(log, 1, loss=math.nan, grad_norm=math.inf)
    returned = log.flush()
    log.validation(validation("a", 0, "x", 1.0) | {"bits_per_byte": math.nan}, 0)
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()

    assert math.isnan(returned[0]["loss_nats_per_token"])
    assert "NaN" not in text
    assert "Infinity" not in text
    assert [written(tmp_path)[0][key] for key in ("loss_nats_per_token", "grad_norm", "mfu")] == [None] * 3
    assert written(tmp_path)[1]["bits_per_byte"] is None


def test_other_ranks_write_nothing_and_still_know_the_numbers(tmp_path):
    """They take part in the check for bad numbers."""
    log = log_in(tmp_path, writing=False)
    keep(log, 1, loss=3.5)
    lines = log.flush()
    log.event("start")
    log.close()

    assert lines[0]["loss_nats_per_token"] == 3.5
    assert not (tmp_path / "metrics.jsonl").exists()


def test_an_incomplete_last_line_is_removed_before_more_is_written(tmp_path):
    """After a crash in the middle of a line; the whole lines stay as they are."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "event", "name": "start"}\n{"kind": "train", "st')
    with open_metrics_file(path) as file:
        file.write(b'{"kind": "event", "name": "resume"}\n')

    assert [line["name"] for line in written(tmp_path)] == ["start", "resume"]


@pytest.mark.parametrize("content", ["", '{"kind": "tr'])
def test_a_metrics_file_without_a_whole_line_becomes_empty(tmp_path, content):
    """The file holds only the beginning of a line, or is empty."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    open_metrics_file(path).close()

    assert path.read_text() == ""


def test_forgetting_is_measured_from_the_last_line_of_a_steps_zero(tmp_path):
    """A stage begun twice, as after a kill during its first validation: the second measurement counts."""
    log = log_in(tmp_path)
    for stage, step, dataset, loss in [("a", 0, "x", 9.0), ("a", 5, "x", 1.0), ("a", 0, "x", 4.0), ("b", 0, "x", 2.0)]:
        log.validation(validation(stage, step, dataset, loss), 0)
    log.close()
    again = log_in(tmp_path)
    again.close()

    assert again.baselines == {("a", "x"): (4.0, None), ("b", "x"): (2.0, None)}


def test_tensorboard_holds_loss_lr_throughput_validation_and_forgetting(tmp_path):
    """Read back with TensorBoard's own reader, at the steps of the whole run."""
    log = log_in(tmp_path, tensorboard=partial(SummaryWriter, str(tmp_path / "tb"), ""))
    keep(log, 1, loss=2.5, grad_norm=0.25)
    keep(log, 2, loss=1.5, grad_norm=0.75)
    log.flush()
    log.validation(validation("b", 5, "pile", 3.0, forgetting=0.5), 105)
    log.validation(validation("b", 5, "german", 4.0), 105)
    log.close()
    curves = curves_in(tmp_path / "tb")

    assert curves["train/loss_nats_per_token"] == [(101, 2.5), (102, 1.5)]
    assert curves["train/grad_norm"] == [(101, 0.25), (102, 0.75)]
    assert curves["train/lr"] == [(101, pytest.approx(1e-3)), (102, pytest.approx(1e-3))]
    assert curves["data/replayed_tokens"] == [(101, 16.0), (102, 16.0)]
    assert curves["validation/pile/loss_nats_per_token"] == [(105, 3.0)]
    assert curves["validation/german/bits_per_byte"] == [(105, 8.0)]
    assert curves["forgetting/pile"] == [(105, 0.5)]
    assert "forgetting/german" not in curves
    assert {"throughput/tokens_per_s", "throughput/mfu", "throughput/memory_gib"} <= curves.keys()


def test_tensorboard_shows_each_step_once_after_a_crash_a_rollback_and_a_resume(tmp_path):
    """Steps 1 to 4 were drawn; a new process resumes after 2, draws 3 and 4, rolls back to 2 and draws only 3.

    The fourth step of both earlier attempts is gone from every curve, and so are their losses of the third.
    """
    opened = partial(SummaryWriter, str(tmp_path / "tb"), "")
    log = log_in(tmp_path, tensorboard=opened)
    log.rewind(100)
    for step in (1, 2, 3, 4):
        keep(log, step, loss=1.0)
    log.flush()
    log.close()
    log = log_in(tmp_path, tensorboard=opened)
    for attempt, steps in ((2.0, (3, 4)), (3.0, (3,))):
        log.rewind(102)
        for step in steps:
            keep(log, step, loss=attempt)
        log.flush()
    log.close()

    assert curves_in(tmp_path / "tb")["train/loss_nats_per_token"] == [(101, 1.0), (102, 1.0), (103, 3.0)]
    assert [step for step, _ in curves_in(tmp_path / "tb")["train/lr"]] == [101, 102, 103]


def opened_both(tmp_path):
    return {
        "tensorboard": partial(SummaryWriter, str(tmp_path / "tb"), ""),
        "over_tokens": partial(SummaryWriter, str(tmp_path / "tb" / "over_tokens"), ""),
    }


def log_with_tokens(tmp_path, **options):
    sizes = {"peak_flops": 600.0, "tokens_at": lambda run_step: 64 * run_step}
    return MetricsLog(tmp_path, writing=True, stages=("z", "a"), **opened_both(tmp_path), **{**sizes, **options})


def test_tensorboard_draws_losses_over_tokens_too_and_each_step_once(tmp_path):
    """Steps of 64 tokens: 3 is drawn at 192. After a rollback to 2 the first attempt at 3 and 4 is gone from both."""
    log = log_with_tokens(tmp_path)
    for attempt, steps in ((1.0, (1, 2, 3, 4)), (2.0, (3,))):
        log.rewind(100 + steps[0] - 1)
        for step in steps:
            keep(log, step, loss=attempt)
        log.flush()
    log.validation(validation("b", 3, "pile", 3.0, forgetting=0.5), 103)
    log.close()
    by_step, by_tokens = curves_in(tmp_path / "tb"), curves_in(tmp_path / "tb" / "over_tokens")

    assert by_step["train/loss_nats_per_token"] == [(101, 1.0), (102, 1.0), (103, 2.0)]
    assert by_tokens["train_over_tokens/loss_nats_per_token"] == [(101 * 64, 1.0), (102 * 64, 1.0), (103 * 64, 2.0)]
    assert by_tokens["validation_over_tokens/pile/loss_nats_per_token"] == [(103 * 64, 3.0)]
    assert by_tokens["forgetting_over_tokens/pile"] == [(103 * 64, 0.5)]
    assert by_step.keys().isdisjoint(by_tokens)


def test_tensorboard_places_steps_of_a_ramp_at_their_tokens(tmp_path):
    """Steps of 10 tokens up to step 102, then of 30; after a rollback to 103 the points of later steps are gone."""
    log = log_with_tokens(tmp_path, tokens_at=lambda run_step: 10 * run_step + 20 * max(0, run_step - 102))
    for attempt, steps in ((1.0, (1, 2, 3, 4)), (2.0, (4,))):
        log.rewind(100 + steps[0] - 1)
        for step in steps:
            keep(log, step, loss=attempt)
        log.flush()
    log.close()
    points = curves_in(tmp_path / "tb" / "over_tokens")["train_over_tokens/loss_nats_per_token"]

    assert points == [(1010, 1.0), (1020, 1.0), (1050, 1.0), (1080, 2.0)]


def test_tensorboard_has_the_number_of_the_stage(tmp_path):
    """Stage a is the second of z and a."""
    log = log_with_tokens(tmp_path)
    keep(log, 1)
    log.flush()
    log.close()

    assert curves_in(tmp_path / "tb")["data/stage"] == [(101, 2.0)]


def test_tensorboard_shows_the_config_once(tmp_path):
    """As a TOML block at step 0; a rollback does not hide it, and the next session knows that it was written."""
    log = log_with_tokens(tmp_path)
    new = log.is_new
    log.show_config('[job]\nname = "x"')
    for _ in range(2):
        log.rewind(100)
        keep(log, 1)
        log.flush()
    log.close()
    again = log_with_tokens(tmp_path)
    again.close()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    (text,) = events.Tensors("config/text_summary")

    assert text.tensor_proto.string_val == [b'```toml\n[job]\nname = "x"\n```']
    assert (new, again.is_new) == (True, False)


def test_tensorboard_marks_where_the_validation_data_of_a_dataset_changed(tmp_path):
    """Measured on A, and in the next session on B: a point at the first one on B; y has none."""
    opened = partial(SummaryWriter, str(tmp_path / "tb"), "")
    for steps, identity in (((1, 2), "A"), ((3, 4), "B")):
        log = log_in(tmp_path, tensorboard=opened)
        for step in steps:
            log.validation(validation("a", step, "x", 1.0) | {"validation_id": identity}, step)
            log.validation(validation("a", step, "y", 1.0) | {"validation_id": "A"}, step)
        log.close()
    curves = curves_in(tmp_path / "tb")

    assert curves["validation_changed/x"] == [(3, 1.0)]
    assert "validation_changed/y" not in curves


def test_a_run_with_nothing_to_do_leaves_no_events_file(tmp_path):
    """Stages that are all skipped are noted only in metrics.jsonl."""
    log = log_in(tmp_path, tensorboard=partial(SummaryWriter, str(tmp_path / "tb"), ""))
    log.event("start")
    log.event("skip", stage="a")
    log.close()

    assert not (tmp_path / "tb").exists()


def test_numbers_that_are_not_finite_are_no_points_of_tensorboards_curves(tmp_path):
    """An unknown MFU and a NaN loss."""
    log = log_in(tmp_path, tensorboard=partial(SummaryWriter, str(tmp_path / "tb"), ""), peak=math.nan)
    keep(log, 1, loss=math.nan)
    log.flush()
    log.close()

    assert {"throughput/mfu", "train/loss_nats_per_token"}.isdisjoint(curves_in(tmp_path / "tb"))


def test_the_peak_of_a_cpu_or_an_unlisted_gpu_is_not_made_up(monkeypatch):
    """A data sheet's number for an H100, NaN for the others, whose MFU is then not shown."""
    on_cpu = peak_flops(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    known = peak_flops(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GeForce 256")
    unknown = peak_flops(torch.device("cuda"))

    assert known == 989e12
    assert math.isnan(on_cpu)
    assert math.isnan(unknown)
