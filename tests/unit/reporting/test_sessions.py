"""Sessions of a run: times, device hours and interruptions, counted by hand."""

import json

import pytest

from titan_cpt.reporting.run_log import read_run
from titan_cpt.reporting.sessions import sessions_of


def event(name, time, **fields):
    return {"kind": "event", "name": name, "time": time, **fields}


def run_with(write_run, events):
    folder = write_run("r", [], begun="")
    folder.joinpath("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in events))
    return read_run(folder)


def test_sessions_add_up_and_interruptions_are_counted(write_run):
    """An hour on 2 GPUs, a restart, half an hour on 4: 1.5 hours, 4 device hours; one rollback of one skipped batch."""
    on = {"versions": {"on": "NVIDIA H100"}}
    events = [
        event("start", 0, world_size=2, **on),
        event("transition", 10, stage="a", step=0),
        event("skip_batch", 1000, stage="a", step=3),
        event("transition", 1001, stage="a", step=0),
        event("stop", 3600, stage="a", step=5, signal="SIGTERM"),
        event("start", 90_000, world_size=4, **on),
        event("resume", 90_010, stage="a", step=5),
        event("save_failed", 90_020, why="disk full"),
        event("checkpoint", 91_800, stage="a", step=10),
    ]
    found = sessions_of(run_with(write_run, events))

    assert (found.started, found.last) == (0, 91_800)
    assert found.wall_s == 5400
    assert found.device_s / 3600 == pytest.approx(1 * 2 + 0.5 * 4)
    assert list(found.hardware) == ["2 x NVIDIA H100", "4 x NVIDIA H100"]
    assert (found.restarts, found.rollbacks, found.skipped, found.stops, found.failed_saves) == (1, 1, 1, 1, 1)
    assert (found.ranks, found.on_cpu) == (None, False)


def test_a_command_that_found_everything_trained_adds_no_time(write_run):
    """Two stages skipped a day later."""
    events = [
        event("start", 0, world_size=1, versions={"on": "x86_64"}),
        event("transition", 0, stage="a", step=0),
        event("checkpoint", 60, stage="a", step=10),
        event("start", 86_400, world_size=1, versions={"on": "x86_64"}),
        event("skip", 86_405, stage="a"),
        event("skip", 86_410, stage="b"),
    ]
    found = sessions_of(run_with(write_run, events))

    assert (found.wall_s, found.restarts, found.ranks, found.on_cpu) == (60, 0, 1, True)


def test_a_log_without_times_has_the_duration_of_its_steps(write_run):
    """20 steps of 1000 tokens at 500 tokens/s: 40 s on 2 ranks."""
    found = sessions_of(read_run(write_run("r", [])))

    assert (found.started, found.wall_s, found.device_s) == (None, 40, 80)


def test_a_killed_run_has_the_time_up_to_its_last_step(write_run):
    """Five steps were saved after 60 s; five more of 1000 tokens at 500 tokens/s follow, then nothing: 70 s."""
    folder = write_run("r", [], begun="a")
    kept = folder.joinpath("metrics.jsonl").read_text().splitlines()[1:]
    on = {"world_size": 1, "versions": {"on": "x86_64"}}
    begin = [event("start", 100, **on), event("transition", 101, stage="a", step=0)]
    lines = [*map(json.dumps, begin), *kept[:5], json.dumps(event("checkpoint", 160, stage="a", step=5)), *kept[5:]]
    folder.joinpath("metrics.jsonl").write_text("".join(line + "\n" for line in lines))

    assert sessions_of(read_run(folder)).wall_s == pytest.approx(70)
