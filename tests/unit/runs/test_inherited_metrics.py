"""metrics.jsonl of a run that begins with another run's checkpoint."""

import json

from titan_cpt.runs.inherited_metrics import copy_metrics


def step(stage, number):
    return {"kind": "train", "stage": stage, "step": number, "loss_nats_per_token": 1.0}


def loss(stage, number):
    return {"kind": "validation", "stage": stage, "step": number, "dataset": "x", "loss_nats_per_token": 2.0}


def test_lines_up_to_the_checkpoint_are_copied_and_an_event_is_appended(tmp_path):
    """All of stage a, stage b up to step 2, nothing of c; the losses at the start of b are among them."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    lines = [step("a", 1), step("a", 2), loss("b", 0), step("b", 1), step("b", 2), loss("b", 2), step("b", 3)]
    lines += [loss("b", 3), step("c", 1)]
    (source / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    copy_metrics(source, target, stages=["a", "b", "c"], until={"a": None, "b": 2}, event={"name": "branch"})
    copied = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]

    assert copied == [
        *(step("a", 1), step("a", 2), step("b", 1), step("b", 2)),
        *(loss("b", 0), loss("b", 2)),
        {"kind": "event", "name": "branch"},
    ]
