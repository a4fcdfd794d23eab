"""Reading run folders: unique names, damaged plans, and paths that are not runs."""

import shutil
from pathlib import Path

import pytest

from titan_cpt.errors import DataError
from titan_cpt.reporting.html_page import default_folder
from titan_cpt.reporting.run_log import read_run, read_runs, with_unique_names
from titan_cpt.reporting.summary import summarize_log
from unit.reporting.run_folders import EN_DE, stage, trained


def test_runs_get_unique_names(write_run):
    """By their parent folder; runs of one folder keep their names, copies of a run get those of their folders."""
    apart = with_unique_names([read_run(write_run("x/seed-0", EN_DE)), read_run(write_run("y/seed-0", EN_DE))])
    together = with_unique_names([read_run(write_run("z/one", EN_DE)), read_run(write_run("z/two", EN_DE))])

    copy = shutil.copytree(together[0].folder, together[0].folder.parent / "one-backup")
    copies = with_unique_names([together[0], read_run(copy)])

    assert [record.name for record in copies] == ["one", "one-backup"]
    assert [record.name for record in with_unique_names([*copies, read_run(apart[0].folder)])] == [
        "z/one",
        "z/one-backup",
        "x/seed-0",
    ]
    assert [record.name for record in apart] == ["x/seed-0", "y/seed-0"]
    assert [record.name for record in together] == ["one", "two"]
    assert default_folder([apart[0].folder, apart[1].folder]).parent == apart[0].folder.resolve().parents[1]
    assert default_folder([apart[0].folder]) == apart[0].folder / "report"


def test_a_label_before_the_folder_names_a_run(write_run, tmp_path):
    """Wherever the folder is; a folder with "=" in its name is no label, and a label is given once."""
    one, two = write_run("x/seed-0", EN_DE), write_run("y/seed=0", EN_DE)
    errors = []

    named = read_runs([Path(f"joint training={one}"), two, Path(f"joint training={two}")], errors.append)

    assert [run.name for run in with_unique_names(named)] == ["joint training", "y/seed=0"]
    assert [run.folder for run in named] == [one, two]
    assert errors == [f"joint training={two}: another run has this label; choose another one"]


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"name": "r"}', '{"name": "r", "stages": [3]}'])
def test_a_damaged_plan_is_an_error(tmp_path, content):
    """Empty, truncated, or JSON that is not a plan."""
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(DataError, match=r"plan.json: (cannot be read: )?damaged"):
        read_run(tmp_path)


def test_a_path_that_is_not_a_run_is_an_error_that_lists_nearby_runs(write_run, tmp_path):
    """A missing path, a file, a folder without runs, one with runs or sweeps, a stage, a checkpoint."""
    mine = write_run("outputs/mine", EN_DE)
    of_a_sweep = write_run("outputs/sweep/run", EN_DE)
    (mine / "a" / "step-00000004").mkdir(parents=True)
    (tmp_path / "empty").mkdir()

    def message(path):
        with pytest.raises(DataError) as error:
            read_run(path)
        return str(error.value).removeprefix(f"{path}: ")

    assert message(tmp_path / "nowhere").startswith("no such file or folder")
    assert message(mine / "plan.json").startswith("is a file")
    assert message(tmp_path / "empty").startswith("is not a run folder")
    assert message(tmp_path / "outputs").endswith(f"the 2 runs below it: {mine} {of_a_sweep}")
    assert message(mine / "a") == f"is a stage of the run {mine}: give {mine}"
    assert message(mine / "a" / "step-00000004") == f"is a checkpoint of the run {mine}: give {mine}"


def ramped(of, step, run_step, tokens, **more):
    return trained(of, step, run_step, 1e-3) | {"tokens": tokens, **more}


# 100 tokens in each of two steps of `a` and 300 in the third one; 50 in each step of `b`.
RAMP = [
    *(ramped("a", step, step, tokens) for step, tokens in ((1, 100), (2, 200), (3, 500))),
    *(ramped("b", step, 3 + step, 500 + 50 * step) for step in (1, 2)),
]


def test_tokens_seconds_and_totals_follow_a_ramp_and_another_length(write_run):
    """All steps are recorded at 500 tokens/s: 0.2 + 0.2 + 0.6 s, then 0.1 + 0.1 s."""
    stages = [
        stage("a", 3, ["en"], 3) | {"seq_len": 10, "batch_sizes": [[0, 10], [2, 30]]},
        stage("b", 2, ["de"], 2) | {"seq_len": 25, "batch_sizes": [[0, 2]]},
    ]
    run = read_run(write_run("ramped", RAMP, stages, begun=""))
    a, b = summarize_log(run)["stages"]

    assert [run.tokens_at("a", step) for step in (1, 2, 3)] == [100, 200, 500]
    assert [run.tokens_at("b", step) for step in (0, 1, 2)] == [500, 550, 600]
    assert (a["trained_tokens"], b["trained_tokens"]) == (500, 100)
    assert [a["seconds"], b["seconds"]] == pytest.approx([1.0, 0.2])


@pytest.mark.parametrize("lost", [(), (2,), (1,), (3,), (0, 1)])
def test_without_a_plan_the_tokens_are_those_of_the_recorded_steps(write_run, lost):
    """Also if lines of other steps are missing."""
    lines = [line for index, line in enumerate(RAMP) if index not in lost]
    run = read_run(write_run("ramped", lines, plan=False, begun="") / "metrics.jsonl")

    assert [run.tokens_at(line["stage"], line["step"]) for line in lines] == [line["tokens"] for line in lines]
    assert run.tokens.total == 600
