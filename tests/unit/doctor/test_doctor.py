"""Checks run apart from each other: one that fails, crashes or hangs is a finding, and the others still run."""

import os
import re
import time
from pathlib import Path

import pytest

from titan_cpt.doctor.doctor import Check, examine, run_check
from titan_cpt.doctor.request import Request


@pytest.fixture(autouse=True)
def helpers_are_found(monkeypatch):
    """By the processes of the checks, too."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, [Path(__file__).parents[2], Path(__file__).parents[3]])))


def check(name, timeout_s=60.0, needs_config=False):
    return Check(name, f"doctor_checks:{name}", timeout_s, needs_config)


def summary(findings):
    return [(finding.level, finding.topic) for finding in findings]


def test_findings_come_in_the_order_of_the_checks_around_those_that_fail():
    findings = list(examine(Request(), [check("works"), check("raises"), check("crashes"), check("prints")]))
    assert summary(findings) == [
        ("ok", "works"),
        ("ok", "raises"),
        ("problem", "raises"),
        ("ok", "crashes"),
        ("problem", "crashes"),
        ("ok", "prints"),
    ]
    assert findings[2].text == "the check itself failed: RuntimeError: the disk is gone"
    assert "was killed by SIGABRT" in findings[4].text


def test_a_check_that_hangs_is_killed_with_what_it_started():
    begin = time.monotonic()
    first, second = run_check(check("hangs", timeout_s=5), Request())
    assert time.monotonic() - begin < 30
    assert (first.level, second.level) == ("ok", "problem")
    found = re.fullmatch(r"the check did not end within 5 s: child (\d+)", second.text)
    assert found
    deadline = time.monotonic() + 10
    while _is_running(int(found[1])) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(int(found[1]))


def _is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_users_mistake_in_a_later_check_is_a_note_because_the_plan_says_it():
    (finding,) = run_check(check("refuses"), Request())
    assert (finding.level, finding.text) == ("note", "not checked, because: data.idx: damaged")


def test_checks_of_a_config_are_skipped_without_one_and_get_it_otherwise():
    checks = [check("works", needs_config=True)]
    assert list(examine(Request(), checks)) == []
    request = Request(Path("a b.toml"), (("training.seq_len", "4"),), 8)
    assert [finding.text for finding in examine(request, checks)] == ["with a b.toml"]


def test_a_request_survives_json():
    request = Request(Path("a.toml"), (("training.seq_len", "4"),), 8)
    assert Request.from_json(request.as_json()) == request
    assert Request.from_json(Request().as_json()) == Request()
