"""`titan-cpt runs` of a run that the program trained."""

import json

import pytest
import training

from titan_cpt.cli import main

pytestmark = training.THEIR_WARNINGS_IGNORED


def status_of(*words):
    with pytest.raises(SystemExit) as leaving:
        main(["runs", *map(str, words)])
    return leaving.value.code


def test_a_trained_run_is_finished_with_its_last_losses(tmp_path, capsys):
    """As JSON the whole state, with the losses of the run's summary.json; as a table one line."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path / "out")
    outcome = training.train(training.write_config(raw, tmp_path / "c.toml"))
    assert outcome.status == 0, outcome.output
    summary = json.loads((tmp_path / "out" / "run" / "summary.json").read_text(encoding="utf-8"))

    assert status_of(tmp_path / "out", "--json") == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert {key: run[key] for key in ("name", "state", "stage", "step", "run_steps", "total_steps")} == {
        **{"name": "run", "state": "finished", "stage": "german", "step": 10, "run_steps": 22, "total_steps": 22},
    }
    assert run["losses"] == summary["stages"][-1]["after"]
    assert run["checkpoints"] >= 2
    assert status_of(tmp_path / "out") == 0
    assert "finished" in capsys.readouterr().out
    assert status_of(tmp_path / "nowhere") == 2
