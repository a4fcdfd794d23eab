"""[profiling]: which steps are traced, what a trace holds, and that a traced run has the same numbers."""

import gzip
import json

import pytest
import training

pytestmark = training.THEIR_WARNINGS_IGNORED


@pytest.fixture
def raw(tmp_path):
    """Two small stages, of 12 and 10 steps."""
    return training.two_stages(training.write_languages(tmp_path), tmp_path)


def train(raw, folder, **tables):
    """The folder of a finished run."""
    (folder / "out").mkdir(parents=True)
    raw = training.changed(raw, **tables)
    raw["job"]["output_dir"] = str(folder / "out")
    outcome = training.train(training.write_config(raw, folder / "run.toml"))
    assert outcome.status == 0, outcome
    return folder / "out" / raw["job"]["name"]


def test_one_step_in_every_n_is_traced_and_no_number_changes(raw, tmp_path):
    """Every fifth step of 22, by stage and step; a trace names torch's operators; losses and weights are the same."""
    traced = train(raw, tmp_path / "traced", profiling={"enable_profiling": True, "profile_freq": 5})
    plain = train(raw, tmp_path / "plain")
    first, second = (stage["name"] for stage in raw["stages"])
    expected = [
        f"{first}-step-00000005",
        f"{first}-step-00000010",
        f"{second}-step-00000003",
        f"{second}-step-00000008",
    ]

    assert sorted(path.name for path in (traced / "profile").iterdir()) == expected
    assert not (plain / "profile").exists()
    assert training.numbers_of(traced) == training.numbers_of(plain)
    for name in expected:
        with gzip.open(traced / "profile" / name / "rank-00000.json.gz", "rt") as file:
            events = json.load(file)["traceEvents"]
        operators = {event["name"] for event in events if event.get("cat") == "cpu_op"}
        assert {"aten::embedding", "aten::mm"} <= operators


def test_a_trace_that_cannot_be_written_does_not_stop_the_run(raw, tmp_path):
    """A file has the folder's name: the run prints a warning, and every step is trained."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "profile").write_text("in the way")
    raw = training.changed(raw, profiling={"enable_profiling": True, "profile_freq": 5})
    outcome = training.train(training.write_config(raw, tmp_path / "run.toml"))

    assert outcome.status == 0
    assert "the trace cannot be written: " in " ".join(outcome.output.split())
    assert len(training.lines_of(folder, "train")) == 22
