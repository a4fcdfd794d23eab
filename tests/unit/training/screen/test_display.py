"""What a run prints: a table of steps, the time left, a bar that fits the terminal, and where a stage starts."""

import io
import math
import re
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.common.batch_sizes import BatchSizes
from titan_cpt.common.console import RunConsole, Verbosity
from titan_cpt.common.log_file import LogFile
from titan_cpt.training.screen.display import Display, _Bar

LINE = {
    "step": 20,
    "run_step": 20,
    "loss_nats_per_token": 2.5,
    "grad_norm": 1.234,
    "lr": 1e-3,
    "memory_gib": 42.13,
    "tokens_per_s": 12_345.6,
    "mfu": math.nan,
    "tokens": 6400,
}


def display_of(plan, *, shown=True, steps_done=0, terminal=False, log=None, verbosity=Verbosity.NORMAL, width=80):
    """A display and the text that it has printed so far."""
    console = RunConsole(
        file=io.StringIO(), width=width, shown=shown, verbosity=verbosity, log=log, force_terminal=terminal
    )
    return Display(plan, console, steps_done=steps_done), console.file


def test_a_step_is_a_row_with_the_time_left(make, two_stages, monkeypatch):
    """10 of 100 steps in 40 s after a resume at step 10: 80 steps of the stage and 130 of the run are left."""
    plan = make(two_stages)
    display, out = display_of(plan, steps_done=10)
    begin = time.perf_counter()
    monkeypatch.setattr(display, "_start_time", begin - 40)
    display.step(plan.stages[0], LINE)
    heading, row = out.getvalue().splitlines()

    assert heading.split() == ["step", "loss", "grad", "norm", "LR", "memory", "tokens/s", "ETA", "of", "run"]
    assert row.split() == ["20", "2.5000", "1.23", "1.00e-03", "42.1GiB", "12.3K", "5m20s", "8m40s"]


def test_the_time_left_counts_the_work_of_each_stage(make, two_stages, monkeypatch):
    """Ten steps took 40 s: 80 of the stage take 320 s, and 50 of the second one, with twice the batch, 400 s."""
    plan = make(two_stages)
    first, second = plan.stages
    doubled = replace(second, batch_sizes=BatchSizes.constant(2 * plan.global_batch_size))
    plan = replace(plan, stages=(first, doubled))
    display, out = display_of(plan, steps_done=10)
    monkeypatch.setattr(display, "_start_time", time.perf_counter() - 40)
    display.step(first, LINE)

    assert out.getvalue().split()[-2:] == ["5m20s", "12m00s"]


def test_the_time_left_is_unknown_before_the_first_step(make, two_stages):
    """Of this session."""
    plan = make(two_stages)
    display, out = display_of(plan, steps_done=20)
    display.step(plan.stages[0], LINE)

    assert out.getvalue().split()[-2:] == ["?", "?"]


def test_other_ranks_print_nothing(make, two_stages, tmp_path):
    """Neither steps nor messages nor results; their log has no copies of rank 0's lines."""
    plan = make(two_stages)
    log = LogFile(tmp_path / "rank-1.log")
    display, out = display_of(plan, shown=False, log=log)
    display.begin_stage(plan.stages[0], 0)
    display.step(plan.stages[0], LINE)
    display.transition(plan.stages[0], {"weights": "new"})
    display.warn("careful")
    display.end_stage(plan.stages[0], 100)

    assert (out.getvalue(), log.path.read_text()) == ("", "")


def test_a_transition_shows_where_its_data_and_replay_start(make, two_stages):
    """The second stage replays 2,000 sequences of the first; new data is listed before replay."""
    plan = make(two_stages)
    display, out = display_of(plan)
    display.transition(plan.stages[1], {"weights": "from first", "lr": "0.001"})

    assert out.getvalue().splitlines() == [
        "stage 2/2 second begins: 50 steps",
        "  weights   from first",
        "  lr        0.001",
        "  data      german starts at its first sequence",
        "  replay    of pile from sequence 0 of the 2,000 trained on",
    ]


def test_quiet_keeps_warnings_and_results_and_the_log_keeps_all(make, two_stages, tmp_path):
    """Details are for --verbose only, on the terminal and in the log."""
    plan = make(two_stages)

    def said(verbosity):
        log = LogFile(tmp_path / f"{verbosity}.log")
        display, out = display_of(plan, log=log, verbosity=verbosity)
        display.say("said")
        display.warn("warned")
        display.detail("detailed")
        display.result("resulted")
        return out.getvalue().split(), log.path.read_text().split()

    assert said(Verbosity.QUIET) == (["warned", "resulted"], ["said", "warned", "resulted"])
    assert said(Verbosity.NORMAL) == (["said", "warned", "resulted"],) * 2
    assert said(Verbosity.VERBOSE) == (["said", "warned", "detailed", "resulted"],) * 2


def test_a_stage_ends_with_its_steps_and_verbosely_with_its_times(make, two_stages):
    """After a resume those of this session are named too."""
    plan = make(two_stages)
    display, out = display_of(plan, verbosity=Verbosity.VERBOSE, steps_done=40)
    display.begin_stage(plan.stages[0], 40)
    with display.timed("validation"):
        time.sleep(0.06)
    display.end_stage(plan.stages[0], 70)
    end, times = out.getvalue().splitlines()

    assert end == "stage 1/2 first: 70 steps of 100 done (30 in 0s)"
    assert times.startswith("  0.1 s in all, of these validation 0.1 s")


def test_a_terminal_keeps_past_rows_above_a_bar(make, two_stages):
    """At most one row a second, and the last step's always; the bar is gone at the end, and the cursor is back."""
    plan = make(two_stages)
    display, out = display_of(plan, terminal=True)
    display.begin_stage(plan.stages[0], 0)
    for step in (1, 2, 3, 100):
        display.step(plan.stages[0], {**LINE, "step": step, "run_step": step})
    display.end_stage(plan.stages[0], 100)
    display.close()
    text = out.getvalue()
    rows = re.findall(r"(\d+) +2\.5000", text)

    assert rows == ["1", "100"]
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "first 1/2" in text


@given(
    title=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=60),
    steps=st.integers(1, 10**9),
    done=st.floats(0, 1),
    width=st.integers(20, 200),
    etas=st.tuples(st.floats(allow_nan=True), st.floats(allow_nan=True)),
)
def test_the_bar_is_never_wider_than_the_terminal(title, steps, done, width, etas):
    """The steps and times left stay whole; bar and title give way."""
    bar = _Bar(title, 0, steps)
    bar.update(int(done * steps), *etas)
    line = bar.line(width, ascii_only=False)

    assert len(line) <= width
    if width >= 60:
        assert f"{int(done * steps) / steps:.0%}" in line
        assert "ETA" in line
        assert ", run " in line


@pytest.mark.parametrize(("done", "bar"), [(0, "-" * 10), (50, "#" * 5 + "-" * 5), (100, "#" * 10)])
def test_the_bar_shows_the_share_that_is_done(done, bar):
    """In the ASCII form."""
    one = _Bar("s", done, 100)
    one.update(done, 60.0, 120.0)
    rest = f"{done / 100:4.0%} {done}/100  ETA 1m00s, run 2m00s"

    assert one.line(2 + 10 + 1 + len(rest), ascii_only=True) == f"s {bar} {rest}"
