"""`titan-cpt doctor`: a line for each check in 80 columns, what to do at the end, JSON, exit status 1."""

import json

import pytest
from training import two_stages, write_config, write_languages

from titan_cpt.cli import main
from titan_cpt.commands.doctor import as_text, summary
from titan_cpt.doctor import doctor
from titan_cpt.doctor.finding import note, ok, problem


def run(capsys, *words):
    with pytest.raises(SystemExit) as leaving:
        main(["doctor", *map(str, words)])
    return leaving.value.code, capsys.readouterr().out


def test_every_check_of_a_config_that_is_ready_passes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    raw = two_stages(write_languages(tmp_path / "data"), tmp_path / "out")
    config = write_config(raw, tmp_path / "config.toml")
    status, out = run(capsys, config, "--json")
    findings = json.loads(out)["findings"]
    topics = {each["topic"] for each in findings}
    assert topics >= {check.topic for check in doctor.CHECKS} - {"packages", "limits", "gpu", "driver"}
    machine = {"driver", "gpu", "port", "host name", "open files", "file size"}  # what this machine may lack
    assert [each for each in findings if each["level"] == "problem" and each["topic"] not in machine] == []
    assert [(each["level"], each["text"]) for each in findings if each["topic"] == "gloo"] == [
        ("ok", "two processes summed a tensor on this machine")
    ]
    assert status in (0, 1)
    assert json.loads(out)["problems"] == sum(each["level"] == "problem" for each in findings)


def test_a_problem_is_exit_status_1_and_its_remedy_stands_at_the_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor.examine, "__defaults__", (doctor.CHECKS[:1] + doctor.CHECKS[11:12],))
    status, out = run(capsys, tmp_path / "none.toml")
    assert status == 1
    assert "problem plan" in out
    assert out.rstrip().endswith("1 problem")
    assert out.index("To do:") < out.rindex("titan-cpt plan")
    assert max(len(line) for line in out.splitlines() if "/" not in line) <= 80


def test_lines_have_80_columns_and_the_summary_only_what_is_to_do():
    findings = [ok("a", "fine"), note("b", "x " * 100), note("c", "slow", "buy a disk"), problem("d", "bad", "mend it")]
    assert all(len(line) <= 80 for each in findings for line in as_text(each).splitlines())
    assert as_text(findings[0]) == "ok      a             fine"
    assert summary(findings) == "\nTo do:\n  - d: mend it\n\nPerhaps:\n  - c: buy a disk\n\n1 problem"
    assert summary(findings[:1]) == "\nno problems"
