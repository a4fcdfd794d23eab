"""`titan-cpt init` as a user types it."""

import pytest

from titan_cpt.cli import main
from titan_cpt.runs.scenarios import SCENARIOS


def run(*words):
    with pytest.raises(SystemExit) as leaving:
        main(["init", *words])
    return leaving.value.code


def test_the_list_has_a_line_for_each_scenario(capsys):
    """Its name first."""
    assert run("--list") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(SCENARIOS)


def test_it_asks_nothing_and_names_the_next_commands(tmp_path, monkeypatch, capsys):
    """The file's name is the scenario's by default; a sweep is trained by another command."""
    monkeypatch.chdir(tmp_path)
    assert run("laptop") == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["  titan-cpt plan laptop.toml", "  ./run_train.sh laptop.toml"]
    assert run("sweep", "many.toml", "--name", "many", "--text", "de=x/*.txt", "--steps", "7") == 0
    assert capsys.readouterr().out.splitlines()[2] == "  titan-cpt sweep many.toml"
    assert 'text = "x/*.txt"' in (tmp_path / "many.toml").read_text(encoding="utf-8")
    assert run("laptop") == 2
    assert run() == 2
    assert "SCENARIO is missing: laptop, " in capsys.readouterr().err
