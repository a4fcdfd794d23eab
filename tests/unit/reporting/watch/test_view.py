"""A run on one screen: it fits terminals of any size and shows what the folder says."""

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from titan_cpt.reporting.watch.run_follower import RunFollower
from titan_cpt.reporting.watch.view import describe_event, screen
from unit.reporting.run_folders import AVERAGED, EN_DE, measured, stage, trained, use

SKIPPED = {"kind": "event", "name": "skip_batch", "stage": "b", "step": 3, "why": "the loss is nan", "time": 1.0}


def shown(folder, *, state="running", why="", width=80, height=24, now=None):
    """The lines of the screen."""
    run = RunFollower(folder)
    run.refresh()
    rows = screen(run, state, why, width=width, height=height, now=time.time() if now is None else now)
    return [row.text for row in rows]


def test_stages_losses_forgetting_and_throughput_are_shown(write_run):
    """Two finished stages of the made-up run."""
    lines = shown(write_run("one", EN_DE))
    named = {line.split()[0]: line for line in lines if line}

    assert lines[0].startswith("one  running")
    assert lines[0].endswith("ago")
    assert named["all"].endswith("100% 20/20, ETA 0s")
    assert named["2/2"].split()[1:] == ["b", "━" * 26, "100%", "10/10,", "ETA", "0s"]
    assert named["LR"].split() == ["LR", "1.00e-03", "grad", "norm", "1.00", "500", "tokens/s", "0.25GiB", "MFU", "50%"]
    assert named["training"].endswith(f"3.0000{'':12}")
    assert named["en"].split()[-2:] == ["5.0000", "+1.0000"]
    assert named["de"].split()[-1] == "3.0000"


def test_an_average_is_shown_while_its_stage_is_trained(write_run):
    """Beside the weights; a later stage that has no average yet does not show that of the stage before."""
    stages = [stage(name, 10, ["de"], 20, en=use(5000), de=use(5000)) for name in ("b", "c")]
    lines = [line for line in AVERAGED if line["stage"] == "b"]
    now = {line.split()[0]: line.split() for line in shown(write_run("one", lines, stages)) if line}
    later = [*lines, measured("c", 0, "en", 5.0, 1.0)]
    then = {line.split()[0]: line.split() for line in shown(write_run("two", later, stages)) if line}

    assert now["en@average"][-2:] == ["4.6000", "+0.6000"]
    assert now["en"][-2:] == ["5.0000", "+1.0000"]
    assert "4.6000" not in then["en@average"]


def test_a_rollback_is_an_event_and_takes_steps_back(write_run):
    """Steps 3 to 10 of the second stage were undone and step 3 was trained again."""
    lines = shown(write_run("one", [SKIPPED, trained("b", 3, 13, 5e-4)]))
    text = "\n".join(lines)

    assert "30% 3/10" in text
    assert "LR 5.00e-04" in text
    assert "batch skipped at step 3 of b: the loss is nan" in text


def test_all_bars_have_the_same_length(write_run):
    """Also where one has a time left and the others have none."""
    folder = write_run(
        "one", [{"kind": "event", "name": "transition", "stage": "b", "step": 0}, trained("b", 3, 13, 1)]
    )
    lines = shown(folder, width=60)
    bars = [line[25:].split()[0] for line in lines if line.startswith(("all", "1/2", "2/2"))]

    assert sum("ETA" in line for line in lines) == 2
    assert len(bars) == 3
    assert len({len(bar) for bar in bars}) == 1


def test_damaged_lines_are_counted(write_run):
    """And nothing else changes."""
    folder = write_run("one", EN_DE)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("not json\n")

    assert "  metrics.jsonl: 1 damaged line skipped" in shown(folder)


def test_the_newest_checkpoint_is_named_with_its_age(write_run):
    """By its path in the run's folder."""
    saved = {
        "kind": "event",
        "name": "checkpoint",
        "stage": "b",
        "step": 10,
        "folder": "/x/b/step-00000010",
        "time": 100.0,
    }
    lines = shown(write_run("one", [*EN_DE, saved]), now=160.0)

    assert "newest checkpoint: b/step-00000010 (1m00s ago)" in lines


def test_losses_are_shown_where_their_curves_have_no_room(tmp_path):
    """Thirty stages on 60 columns: the last values without a curve."""
    names = [f"s{number}" for number in range(30)]
    plan = {"name": "wide", "step_tokens": 1, "stages": [stage(one, 4, ["en"], 1, en=use(1)) for one in names]}
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"fingerprint": "f"}))
    lines = [trained("s0", 1, 1, 1e-3), measured("s0", 1, "en", 2.0, 0.5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = {line.split()[0]: line.split()[1:] for line in shown(tmp_path, width=60, height=60) if line}

    assert rows["en"] == ["2.0000", "+0.5000"]
    assert len(rows["training"]) == 1


def test_a_run_that_has_not_begun_shows_its_stages(write_run):
    """With a plan and no metrics."""
    folder = write_run("one", [])
    (folder / "metrics.jsonl").unlink()
    lines = shown(folder, state="planned")

    assert lines[0].strip() == "one  planned"
    assert [line.split()[-1] for line in lines if line.startswith(("1/2", "2/2"))] == ["0/10", "0/10"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    width=st.integers(60, 200),
    height=st.integers(12, 60),
    stages=st.integers(1, 30),
    datasets=st.integers(1, 40),
    name=st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=60),
)
def test_the_screen_fits_every_terminal(tmp_path_factory, width, height, stages, datasets, name):
    """With many stages and datasets of long names: what has no room is counted."""
    folder = tmp_path_factory.mktemp("run")
    names = [f"{name}{number}" for number in range(stages)]
    data = [f"{name}.{number}" for number in range(datasets)]
    plan = [stage(one, 10**6, [name], 1, **{name: use(1)}) for one in names]
    (folder / "plan.json").write_text(
        json.dumps({"name": name, "fingerprint": "f", "step_tokens": 10**6, "stages": plan})
    )
    lines = [trained(names[-1], 1, 1, 1e-3), *(measured(names[-1], 1, one, 2.0, 0.5) for one in data)]
    lines += [SKIPPED | {"why": "x" * 300}] * 12
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = shown(folder, why="process 1 on host gpu", width=width, height=height)

    assert len(rows) <= max(height, 12)
    assert max(map(len, rows)) <= width
    assert any(row.startswith("all") for row in rows)
    assert any("skipped" in row for row in rows)


@pytest.mark.parametrize(
    ("event", "text", "is_bad"),
    [
        ({"name": "start", "world_size": 8}, "started; ranks: 8", False),
        ({"name": "resume", "stage": "b", "step": 4}, "resumed after step 4 of b", False),
        ({"name": "stop", "stage": "b", "step": 4, "signal": "SIGTERM"}, "stopped after step 4 of b: SIGTERM", False),
        ({"name": "stop", "stage": "b", "step": 4, "why": "nan"}, "stopped after step 4 of b: nan", True),
        ({"name": "save_failed", "why": "disk full"}, "checkpoint not saved: disk full", True),
        ({"name": "upload_failed", "why": "upload failed: access denied"}, "upload failed: access denied", True),
        ({"name": "loss_spike", "stage": "b", "step": 4}, "loss spike at step 4 of b: nan standard deviations", True),
        ({"name": "unheard_of"}, "unheard_of", False),
    ],
)
def test_events_are_sentences(event, text, is_bad):
    """Events of later versions keep their name."""
    assert describe_event(event) == (text, is_bad)
