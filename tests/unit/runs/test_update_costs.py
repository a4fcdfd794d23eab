"""What future updates cost: by hand, at the speed of a run, and as the command prints them."""

import json

import pytest
from plans import datasets, stage

from titan_cpt.cli import main
from titan_cpt.errors import DataError
from titan_cpt.runs.update_costs import measured_rate, rate_or_assumption, update_costs, update_lines


@pytest.fixture
def two(make, head):
    """100 steps on the Pile, then 50 on German: 32,000 and 16,000 tokens."""
    return make(head + stage("pile", "pile", 100) + stage("german", "german", 50))


def write_run(folder, *, seconds=None, world_size=2, mfu=0.4, on="NVIDIA H100 80GB HBM3"):
    """A run of one stage with two steps of 1000 tokens at 10^9 FLOPs each; `seconds` for a step."""
    folder.mkdir(parents=True)
    known = {"name": "a", "steps": 2, "tokens": 2000, "union_tokens": 2000, "new_datasets": [], "datasets": {}}
    known |= {"final_window": [], "flops_per_token": 1e9}
    plan = {"name": "r", "fingerprint": "f", "step_tokens": 1000, "stages": [known]}
    (folder / "plan.json").write_text(json.dumps(plan))
    start = {"kind": "event", "name": "start", "time": 0.0, "world_size": world_size, "versions": {"on": on}}
    speed = None if seconds is None else 1000 / seconds
    steps = [
        {"kind": "train", "stage": "a", "step": step, "run_step": step, "tokens": step * 1000, "lr": 1.0}
        | {"loss_nats_per_token": 1.0, "tokens_per_s": speed, "mfu": mfu}
        for step in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in (start, *steps)))
    return folder


def test_the_costs_of_three_updates_by_hand(two):
    """Retraining: 64,000, then 80,000, then 96,000 tokens; continual pre-training: 16,000 each time."""
    costs = update_costs(two, 3)
    per_token = two.stages[0].flops_per_token

    assert [cost.continual_tokens for cost in costs] == [16_000, 32_000, 48_000]
    assert [cost.retraining_tokens for cost in costs] == [64_000, 144_000, 240_000]
    assert [cost.retraining_flops for cost in costs] == pytest.approx(
        [tokens * per_token for tokens in (64_000, 144_000, 240_000)]
    )
    before = update_costs(two, 2, trained_before=1_000_000)
    assert [cost.retraining_tokens for cost in before] == [1_064_000, 2_144_000]
    assert [cost.continual_tokens for cost in before] == [16_000, 32_000]


def test_the_rate_of_a_run_is_its_flops_per_second_and_device(tmp_path):
    """1000 tokens x 10^9 FLOPs in 4 s on two ranks: 1.25 x 10^11 FLOP/s each."""
    rate = measured_rate(write_run(tmp_path / "r", seconds=4))

    assert rate.flops_per_s == pytest.approx(1.25e11)
    assert (rate.mfu, rate.measured) == (pytest.approx(0.4), True)
    assert "measured in" in rate.source
    assert "2 x NVIDIA H100 80GB HBM3, MFU 40.0%" in rate.source


def test_a_run_without_durations_has_no_rate(tmp_path):
    """Refused with --measured; otherwise the assumption is named."""
    folder = write_run(tmp_path / "r")
    with pytest.raises(DataError, match="has no recorded steps"):
        measured_rate(folder)

    assert rate_or_assumption(folder).source == "assumed: 50% of an H100 SXM's 989 TFLOP/s"
    assert not rate_or_assumption(tmp_path / "absent").measured


def test_the_table_has_the_first_and_the_last_of_many_updates(two, tmp_path):
    """12 rows; the last update's ratio is 40 x 16 / (40 x 48 + 16 x 40 x 41 / 2) = 0.0425."""
    rate = rate_or_assumption(tmp_path)
    lines = list(update_lines(two, update_costs(two, 40), rate))
    rows = [line.split() for line in lines if line[:1].isdigit() and len(line.split()) == 8]

    assert [row[0] for row in rows] == [*map(str, range(1, 12)), "40"]
    assert float(rows[-1][-1]) == pytest.approx(0.0425, abs=1e-3)
    assert "lower bound" not in "".join(lines)


def test_weights_from_elsewhere_make_retraining_a_lower_bound(make, head, tmp_path):
    """Until --trained-before says what they were trained on."""
    plan = make(head + datasets() + stage("german", "german", 50, init='"hf:somewhere"'))
    rate = rate_or_assumption(tmp_path)

    assert "lower bound: give them with --trained-before" in "".join(update_lines(plan, update_costs(plan, 1), rate))
    assert "lower bound" not in "".join(update_lines(plan, update_costs(plan, 1, 10), rate, 10))


def test_the_command_prints_both_ways_at_the_speed_of_a_run(write, head, tmp_path, monkeypatch, capsys):
    """As text and as JSON; without --measured the speed is that of the config's own run."""
    monkeypatch.chdir(tmp_path)
    path = write(head + stage("pile", "pile", 100) + stage("german", "german", 50))
    run = write_run(tmp_path / "slow", seconds=4)
    shown = {}
    for words in (["--json", "--updates", "2", "--measured", str(run)], ["--updates", "2"]):
        with pytest.raises(SystemExit) as leaving:
            main(["plan", str(path), *words])
        assert leaving.value.code == 0
        shown[words[0]] = capsys.readouterr().out
    answer = json.loads(shown["--json"])["updates"]

    assert [cost["retraining_tokens"] for cost in answer["costs"]] == [64_000, 144_000]
    hours = answer["costs"][1]["continual_flops"] / 1.25e11 / 3600
    assert answer["costs"][1]["continual_device_hours"] == pytest.approx(hours)
    assert answer["rate"]["measured"]
    assert "2 future updates of the size of 'german'" in shown["--updates"]
    assert "assumed: 50% of an H100" in shown["--updates"]
