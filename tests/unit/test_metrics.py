"""metrics.jsonl, TensorBoard and the speed: what is written, when, and what is read back after a crash."""

import json
import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from titan_cpt import metrics
from titan_cpt.errors import DataError
from titan_cpt.metrics import MetricsLog, losses_before, open_record, peak_flops, read_record

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


def log_in(run, *, tensorboard=None, writing=True, flops_per_token=6, peak=600.0):
    return MetricsLog(run, writing=writing, tensorboard=tensorboard, flops_per_token=flops_per_token, peak_flops=peak)


def numbers(step, *, stage="a", lr=1e-3):
    given = {"stage": stage, "step": step, "run_step": 100 + step, "tokens": 64 * step, "replayed_tokens": 16, "lr": lr}
    return {**given, "batch_hash": f"{step:016x}"}


def keep(log, step, *, loss=2.5, grad_norm=0.5, tokens=64):
    log.step(numbers(step), loss=torch.tensor(loss), grad_norm=torch.tensor(grad_norm), tokens=tokens)


def validation(stage, step, dataset, loss, forgetting=None):
    line = {"stage": stage, "step": step, "dataset": dataset, "loss_nats_per_token": loss, "bits_per_byte": loss * 2}
    return {**line, "perplexity": math.exp(loss), "forgetting_nats_per_token": forgetting}


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
    """A second flush has nothing to write."""
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


def test_a_last_line_cut_short_is_taken_away_before_more_is_written(tmp_path):
    """After a crash in the middle of a line; the whole lines stay as they are."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "event", "name": "start"}\n{"kind": "train", "st')
    with open_record(path) as file:
        file.write(b'{"kind": "event", "name": "resume"}\n')

    assert [line["name"] for line in written(tmp_path)] == ["start", "resume"]


@pytest.mark.parametrize("content", ["", '{"kind": "tr'])
def test_a_record_without_a_whole_line_becomes_empty(tmp_path, content):
    """Nothing but the beginning of a line, or nothing."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    open_record(path).close()

    assert path.read_text() == ""


def test_a_reader_passes_over_a_cut_last_line_while_the_run_is_writing(tmp_path):
    """The file is not changed by reading."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "event", "name": "start"}\n{"kind": "train", "st')

    assert [line["name"] for line in read_record(tmp_path)] == ["start"]
    assert path.read_text().endswith('"st')


@pytest.mark.parametrize("damage", [b'{"kind": "tra', b"\x00\x00\x00", b"\xff\xfe{}", b"7", b"[]", b'{"no": "kind"}'])
def test_a_damaged_line_in_the_middle_is_a_data_error_with_its_number(tmp_path, damage):
    """Cut, zeroed by a power failure, no text, or JSON that is no line of ours."""
    whole = b'{"kind": "event", "name": "start"}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + damage + b"\n" + whole)

    with pytest.raises(DataError, match=r"metrics.jsonl:2: "):
        list(read_record(tmp_path))


def test_a_folder_without_a_record_is_told(tmp_path):
    """With what to name instead."""
    with pytest.raises(DataError, match=r"metrics.jsonl: cannot be read.*Name the folder of a run"):
        list(read_record(tmp_path))


def test_forgetting_is_measured_from_the_last_line_of_a_steps_zero(tmp_path):
    """A stage begun twice, as after a kill during its first validation: the second measurement counts."""
    log = log_in(tmp_path)
    for stage, step, dataset, loss in [("a", 0, "x", 9.0), ("a", 5, "x", 1.0), ("a", 0, "x", 4.0), ("b", 0, "x", 2.0)]:
        log.validation(validation(stage, step, dataset, loss), 0)
    log.close()
    again = log_in(tmp_path)
    again.close()

    assert losses_before(tmp_path) == again.before == {("a", "x"): 4.0, ("b", "x"): 2.0}


def test_tensorboard_holds_loss_lr_throughput_validation_and_forgetting(tmp_path):
    """Read back with TensorBoard's own reader, at the steps of the whole run."""
    log = log_in(tmp_path, tensorboard=SummaryWriter(str(tmp_path / "tb")))
    keep(log, 1, loss=2.5, grad_norm=0.25)
    keep(log, 2, loss=1.5, grad_norm=0.75)
    log.flush()
    log.validation(validation("b", 5, "pile", 3.0, forgetting=0.5), 105)
    log.validation(validation("b", 5, "german", 4.0), 105)
    log.close()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    curves = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    assert curves["train/loss_nats_per_token"] == [(101, 2.5), (102, 1.5)]
    assert curves["train/grad_norm"] == [(101, 0.25), (102, 0.75)]
    assert curves["train/lr"] == [(101, pytest.approx(1e-3)), (102, pytest.approx(1e-3))]
    assert curves["data/replayed_tokens"] == [(101, 16.0), (102, 16.0)]
    assert curves["validation/pile/loss_nats_per_token"] == [(105, 3.0)]
    assert curves["validation/german/bits_per_byte"] == [(105, 8.0)]
    assert curves["forgetting/pile"] == [(105, 0.5)]
    assert "forgetting/german" not in curves
    assert {"throughput/tokens_per_s", "throughput/mfu", "throughput/memory_gib"} <= curves.keys()


def test_a_cpus_peak_is_measured_and_an_unknown_gpus_is_not_made_up(monkeypatch):
    """Between a phone and a supercomputer; a data sheet's number for an H100, NaN for a card that is not listed."""
    measured = peak_flops(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    known = peak_flops(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GeForce 256")
    unknown = peak_flops(torch.device("cuda"), torch.bfloat16)

    assert 1e9 < measured < 1e14
    assert known == 989e12
    assert math.isnan(unknown)
