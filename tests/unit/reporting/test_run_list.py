"""The list of runs: their states, their newest losses, and that damaged and very long runs do no harm."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import training
from permissions import modes_count
from rich.console import Console

from titan_cpt.errors import DataError
from titan_cpt.reporting.run_list import list_runs, print_runs_table

pytestmark = training.THEIR_WARNINGS_IGNORED
STAGES = [("first", 10), ("second", 20)]
HOLD_THE_LOCK = """
import sys, time
from pathlib import Path
from titan_cpt.common.run_folder import locked
with locked(Path(sys.argv[1]), rank=0):
    print("held", flush=True)
    time.sleep(600)
"""


def write_run(folder, lines=(), end=None):
    """A run of two stages with these lines in metrics.jsonl, and a manifest at the end of a stage."""
    folder.mkdir(parents=True)
    keys = {"tokens": 0, "union_tokens": 0, "new_datasets": [], "datasets": {}, "final_window": []}
    plan = {"name": folder.name, "fingerprint": "f", "step_tokens": 8}
    plan["stages"] = [{"name": name, "steps": steps, **keys} for name, steps in STAGES]
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    if lines:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    if end:
        (folder / end).mkdir(parents=True)
        (folder / end / "manifest.json").write_text("{}", encoding="utf-8")
    return folder


def step(stage, number):
    return {"kind": "train", "stage": stage, "step": number, "loss_nats_per_token": 5.0}


def loss(stage, number, dataset, value):
    return {"kind": "validation", "stage": stage, "step": number, "dataset": dataset, "loss_nats_per_token": value}


def event(name, **fields):
    return {"kind": "event", "name": name, **fields}


def only(folder):
    (run,) = list_runs(folder)
    return run


def test_a_stopped_run_shows_where_it_stopped_and_its_newest_losses(tmp_path):
    """Those of the last validation; steps are counted within the stage and over all stages."""
    lines = [
        *(loss("first", 10, "en", 3.0), step("second", 1), loss("second", 5, "en", 3.5), loss("second", 5, "de", 4.0)),
        *(step("second", 7), event("stop", stage="second", step=7, signal="SIGTERM")),
    ]
    run = only(write_run(tmp_path / "run", lines))

    assert (run.state, run.why, run.stage, run.step, run.steps) == ("stopped", "by SIGTERM", "second", 7, 20)
    assert (run.run_steps, run.total_steps) == (17, 30)
    assert (dict(run.losses), run.measured_at) == ({"en": 3.5, "de": 4.0}, 5)


def test_undone_steps_do_not_count(tmp_path):
    """After a resume at step 5 the lines of step 6 to 9 are of weights that no longer exist."""
    lines = [
        *(step("first", n) for n in range(1, 10)),
        loss("first", 8, "en", 1.0),
        event("resume", stage="first", step=5),
    ]
    run = only(write_run(tmp_path / "run", [loss("first", 4, "en", 2.0), *lines]))

    assert (run.step, dict(run.losses), run.measured_at) == (5, {"en": 2.0}, 4)


@pytest.mark.parametrize(
    ("lines", "end", "state", "why"),
    [
        ([], None, "planned", ""),
        ([step("second", 20)], "second/step-00000020", "finished", ""),
        ([step("first", 10)], "first/step-00000010", "failed", "ended without a record: killed or crashed"),
        ([step("first", 3), event("skip_batch", stage="first", step=4, why="loss")], None, "failed", "ended without"),
        (
            [step("first", 3), event("stop", stage="first", step=3, why="the loss is nan")],
            None,
            "failed",
            "the loss is",
        ),
        ([event("start")], None, "failed", "ended without a record"),
    ],
)
def test_the_state_of_a_run_that_is_not_running(tmp_path, lines, end, state, why):
    """Finished is a run whose last stage has its checkpoint; the end of an earlier stage is not enough."""
    run = only(write_run(tmp_path / "run", lines, end))

    assert run.state == state
    assert run.why.startswith(why)


def test_a_run_is_running_while_a_process_holds_its_lock(tmp_path):
    """Also one whose last stage is trained; the list takes no lock, and a killed process holds none."""
    folder = write_run(tmp_path / "run", [step("second", 20)], "second/step-00000020")
    with subprocess.Popen([sys.executable, "-c", HOLD_THE_LOCK, folder], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            run = only(folder)
            assert (run.state, run.why.split(",")[0].split(" on ")[0]) == ("running", f"process {process.pid}")
        finally:
            process.send_signal(signal.SIGKILL)
    assert only(folder).state == "finished"


def test_damaged_runs_are_lines_with_the_reason(tmp_path):
    """An unreadable plan; damaged lines of metrics.jsonl are skipped, as in a report."""
    (write_run(tmp_path / "a") / "plan.json").write_text("{", encoding="utf-8")
    (write_run(tmp_path / "b") / "plan.json").write_text('{"stages": 3}', encoding="utf-8")
    (write_run(tmp_path / "c") / "metrics.jsonl").mkdir()
    half = write_run(tmp_path / "d", [step("first", 2)]) / "metrics.jsonl"
    half.write_bytes(b"\xff\x00\n" + half.read_bytes() + b'{"kind": "tra')
    runs = list_runs(tmp_path, "name")

    assert [(run.name, run.state) for run in runs] == [*((n, "damaged") for n in "abc"), ("d", "failed")]
    assert runs[0].why.startswith("plan.json: cannot be read: damaged")
    assert runs[3].step == 2


def test_a_folder_of_somebody_else_is_a_line_and_the_others_are_listed(tmp_path):
    """Runs of several people are in one folder on many clusters; the folder itself must be readable."""
    write_run(tmp_path / "mine", [step("first", 3)])
    write_run(tmp_path / "private", [step("first", 3)]).chmod(0)
    with modes_count():
        mine, private = list_runs(tmp_path, "name")
        tmp_path.chmod(0)
        with pytest.raises(PermissionError):
            list_runs(tmp_path)
    tmp_path.chmod(0o700)

    assert (mine.state, private.state) == ("failed", "damaged")
    assert private.why.startswith("plan.json: ")
    assert "Permission denied" in private.why


def test_runs_of_a_sweep_are_found_and_other_folders_are_not(tmp_path):
    """A prepared sweep run has only its config; a checkpoint and a folder of a stage are no runs."""
    write_run(tmp_path / "one", [step("first", 1)], "first/step-00000001")
    (tmp_path / "sweep" / "lr-1").mkdir(parents=True)
    (tmp_path / "sweep" / "lr-1" / "arm.toml").touch()
    (tmp_path / "text" / "english").mkdir(parents=True)

    assert {(run.name, run.state) for run in list_runs(tmp_path)} == {("one", "failed"), ("sweep/lr-1", "planned")}
    with pytest.raises(DataError, match="no such folder"):
        list_runs(tmp_path / "gone")


def test_the_order_is_by_age_name_or_size(tmp_path):
    """Age: the last written first."""
    for age, name in enumerate(("b", "a", "c")):
        metrics = write_run(tmp_path / name, [step("first", 1)] * (age + 1) * 10) / "metrics.jsonl"
        for path in (metrics, metrics.with_name("plan.json")):
            os.utime(path, (0, 1e9 - age))

    assert ["".join(run.name for run in list_runs(tmp_path, sort)) for sort in ("age", "name", "size")] == [
        *("bac", "abc", "cab")
    ]


def test_a_file_with_two_links_counts_once(tmp_path):
    """Checkpoints of shared stages are hard links."""
    folder = write_run(tmp_path / "run", [step("first", 1)], "first/step-00000001")
    weights = folder / "first" / "step-00000001" / "weights"
    before = only(folder).bytes
    weights.write_bytes(bytes(1000))
    os.link(weights, folder / "again")

    run = only(folder)
    assert (run.bytes, run.checkpoints) == (before + 1000, 1)


def test_a_long_run_is_listed_from_the_end_of_its_log(tmp_path):
    """Only megabytes of it are parsed; the line of a validation far from the end is found all the same."""
    folder = write_run(tmp_path / "run", [loss("first", 1, "en", 9.0)])
    filler = json.dumps(step("first", 2) | {"batch_hash": "x" * 200}) + "\n"
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(filler * 100_000)
        file.write(json.dumps(loss("first", 3, "en", 8.0)) + "\n" + filler.replace('"step": 2', '"step": 4') * 2000)
    begin = time.process_time()
    run = only(folder)

    assert (run.step, dict(run.losses)) == (4, {"en": 8.0})
    assert time.process_time() - begin < 0.5  # a tenth of what all lines take


def test_thousands_of_checkpoints_are_counted_without_opening_one(tmp_path):
    """Manifests that cannot be read are no obstacle."""
    folder = write_run(tmp_path / "run", [step("first", 1)])
    for number in range(2000):
        checkpoint = folder / "first" / f"step-{number:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_bytes(b"\x00")
    begin = time.process_time()

    assert only(folder).checkpoints == 2000
    assert time.process_time() - begin < 0.5


def test_a_run_of_many_datasets_is_still_a_short_entry(tmp_path):
    """The table counts what it does not show; the JSON has all."""
    run = only(write_run(tmp_path / "c", [step("first", 3), *(loss("first", 3, f"d{n}", 2.5) for n in range(7))]))
    console = Console(width=200, record=True, file=Path(os.devnull).open("w"))  # noqa: SIM115
    print_runs_table([run], console)
    console.file.close()

    assert "d0 2.500  d1 2.500  d2 2.500  d3 2.500  and 3 more" in console.export_text()
    assert len(run.as_json()["losses"]) == 7


def test_the_table_fits_80_columns_and_gives_reasons(tmp_path):
    """A line for each run, the reason of the failed one below, and the sum of the sizes."""
    write_run(tmp_path / "a", [step("first", 3), loss("first", 3, "en", 2.5)])
    write_run(tmp_path / "b")
    console = Console(width=80, record=True, file=Path(os.devnull).open("w"))  # noqa: SIM115
    print_runs_table(list_runs(tmp_path, "name"), console)
    console.file.close()
    lines = console.export_text().splitlines()

    assert lines[1].split()[:6] == ["a", "failed", "first", "3/10", "en", "2.500"]
    assert lines[2].split()[:3] == ["b", "planned", "0/30"]
    assert lines[3] == "a: failed: ended without a record: killed or crashed"
    assert lines[4].startswith("2 runs, ")
    assert max(map(len, lines)) <= 80
