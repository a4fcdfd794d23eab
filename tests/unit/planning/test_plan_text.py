"""The plan as text fits the terminal: no line is too wide, no number is cut, whatever the stages are called."""

import io

import plans
import pytest
from rich.console import Console

from titan_cpt.common.text import wrapped
from titan_cpt.planning.plan_text import print_notes, print_plan

NAMES = ("s{number}", "stage-{number}-with-a-name-of-about-fifty-characters-in-all")


@pytest.fixture
def plan_of(make, head):
    """A plan of `count` stages named by a pattern."""

    def plan(count, name):
        stages = "".join(
            f'[[stages]]\nname = "{name.format(number=number)}"\ndataset = "{("pile", "german")[number % 2]}"\n'
            f'steps = {1000 + 7 * number}\nlr = {{ schedule = "cosine", max = 3e-4, min = 1e-5 }}\n'
            + ("replay = { fraction = 0.05 }\n" if number else "")
            for number in range(count)
        )
        return make(head + stages)

    return plan


def text_of(plan, width, *, terminal=False):
    """What is printed, in lines."""
    console = Console(width=width, file=io.StringIO(), force_terminal=terminal, color_system=None)
    print_plan(plan, console, keep_latest_k=2, device_bytes=80 * 2**30)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 3, 12])
@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal(plan_of, width, count, name, terminal):
    """Except a word that is longer; nothing is cut off with dots, and every stage has all of its numbers."""
    plan = plan_of(count, name)
    lines = text_of(plan, width, terminal=terminal)
    too_wide = [line for line in lines if len(line) > width and len(line.split()) > 2]

    assert too_wide == []
    assert not [line for line in lines if "…" in line or "..." in line]
    for stage in plan.stages:
        assert [stage.name in line for line in lines].count(True) >= 1
        numbers = (f"{stage.steps:,}", f"{stage.lr_at(0):.2e}", f"{stage.peak_lr:.2e}", f"{stage.final_lr:.2e}")
        assert [line for line in lines if all(number in line.split() for number in numbers)]


@pytest.mark.parametrize("count", [1, 3, 12, 40])
@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_lr_is_drawn_within_the_width(plan_of, width, count):
    """Six rows of equal shape, with a border after every stage that fits; the others are counted."""
    lines = text_of(plan_of(count, "s{number}"), width)
    drawing = [line for line in lines if "│" in line]
    shown = min(count, (min(width, 112) - 8) // 3)

    assert [line.count("│") for line in drawing] == [shown] * 6
    assert max(map(len, drawing)) <= width
    assert [f"and {count - shown} more stages" in line for line in lines].count(True) == (count > shown)


def test_stages_whose_names_do_not_fit_are_numbered_in_the_drawing(plan_of):
    """By their place in the table."""
    lines = text_of(plan_of(12, "a-rather-long-name-{number}"), 80)
    below = lines[max(index for index, line in enumerate(lines) if "│" in line) + 1]

    assert below.split() == ["stage", *map(str, range(1, 13))]


def test_one_step_without_accumulation_says_so(plan_of, make, two_stages):
    """Not "1 gradient accumulation steps"."""
    lines = " ".join(text_of(make(two_stages), 200))

    assert "1 gradient accumulation" not in lines
    assert ("no gradient accumulation" in lines) != ("gradient accumulation steps" in lines)


def test_long_words_stay_whole():
    """A path can be copied from the terminal."""
    path = "/" + "x" * 100

    assert wrapped(f"note the data {path} is missing", 40) == ["note the data", f"  {path}", "  is missing"]


def test_a_note_of_several_lines_keeps_them():
    """Lists of settings stay lists."""
    console = Console(width=40, file=io.StringIO())
    print_notes(["settings that have changed:\n  a: 1 -> 2\n  b: 3 -> 4"], console)

    assert console.file.getvalue().splitlines() == ["note settings that have changed:", "  a: 1 -> 2", "  b: 3 -> 4"]


def test_stages_with_other_steps_have_lines_of_their_own(make, head):
    """Sequences, tokens, gradient accumulation, FLOPs per token and memory; each batch size of a ramp has a line."""
    keys = {"seq_len": 64, "global_batch_size": '{ "0" = 4, "1000" = 8 }', "local_batch_size": 1}
    lines = text_of(make(head + plans.stage("short", "pile", 2) + plans.stage("long", "pile", 9, **keys)), 200)
    begin = lines.index("steps of 1 rank, 1 data-parallel rank:") + 1
    short, long, later = lines[begin : begin + 3]

    assert short.startswith("  short: 20 sequences x 16 = 320 tokens; 2 sequences x 10 gradient accumulation steps; ")
    assert long.startswith("  long: 4 sequences x 64 = 256 tokens; 1 sequence x 4 gradient accumulation steps; ")
    assert later == "  long from step 5: 8 sequences x 64 = 512 tokens; 1 sequence x 8 gradient accumulation steps"
    assert all(line.endswith("per rank") and " FLOPs per token, " in line for line in (short, long))
    assert any(line.startswith("estimated memory per rank in stage 'long': ") for line in lines)
