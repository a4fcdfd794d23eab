"""Reading sweep files: one run for each combination of values, in a folder of its own; errors before any training."""

from pathlib import Path

import pytest
import training
from sweeps import FRACTION, status_of

from titan_cpt.errors import ConfigError
from titan_cpt.runs.sweep_runs import InvalidSweepRun, SweepRun, read_sweep_runs, single_run_file

pytestmark = training.THEIR_WARNINGS_IGNORED


def test_an_unknown_key_is_refused_before_anything_is_trained(swept):
    """A stage that does not exist, and a key that does not exist."""
    with pytest.raises(
        ConfigError, match=r"sweep.stages.germn.steps: there is no stage 'germn'; did you mean 'german'"
    ):
        read_sweep_runs([swept({"stages.germn.steps": [1, 2]})])
    with pytest.raises(ConfigError, match=r"stages.german.replay.fractoin: unknown key; did you mean 'fraction'"):
        read_sweep_runs([swept({"stages.german.replay.fractoin": [0.1, 0.2]})])


def test_an_invalid_value_makes_only_its_run_invalid(swept):
    """Of three fractions the one above 1 is invalid, with the message of its config."""
    first, second, third = read_sweep_runs([swept({FRACTION: [0.0, 1.25, 0.25]})])

    assert isinstance(first, SweepRun)
    assert isinstance(third, SweepRun)
    assert isinstance(second, InvalidSweepRun)
    assert "stages.german.replay.fraction: must be in [0, 1), got 1.25" in second.problem


def test_every_run_has_its_own_folder(swept, tmp_path):
    """<output_dir>/<job.name>/<name of the run>; two files with the same job.name are refused."""
    path = swept({FRACTION: [0.0, 0.25]})
    runs = read_sweep_runs([path])

    assert [run.folder for run in runs] == [tmp_path / "out" / "run" / f"fraction-{value}" for value in ("0", "0.25")]
    with pytest.raises(ConfigError, match=r"fraction-0: two sweep runs have this folder; change job.name"):
        read_sweep_runs([path, path])


def test_a_file_without_a_sweep_table_is_one_run(swept):
    """Two files, or one with a table, are a sweep."""
    single = swept({})

    assert single_run_file([single]) == single
    assert single_run_file([single, single]) is None
    assert single_run_file([swept({FRACTION: [0.0]})]) is None


def test_a_sweep_file_is_not_trained_as_one_run(swept, capsys):
    """`train` refuses it and names the command; `plan` notes that it shows the base of the sweep runs."""
    path = swept({FRACTION: [0.0, 0.25]})

    assert status_of("train", "--config", path) == 2
    assert f"describes 2 sweep runs: `titan-cpt sweep {path}` trains them" in capsys.readouterr().err
    assert status_of("plan", "--config", path) == 0
    assert "the plan of the base config of a sweep" in " ".join(capsys.readouterr().out.split())


def test_the_runs_of_a_sweep_are_a_group_in_their_trackers(swept):
    """Named after the sweep, unless the file names a group."""
    path = swept({"job.seed": [0, 1]})
    path.write_text(path.read_text() + '\n[metrics.wandb]\n\n[metrics.mlflow]\ngroup = "mine"\n')

    for run in read_sweep_runs([path]):
        assert run.config.metrics.wandb.group == Path(run.config.job.output_dir).name
        assert run.config.metrics.mlflow.group == "mine"
