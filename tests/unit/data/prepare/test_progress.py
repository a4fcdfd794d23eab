"""Progress of `prepare`: a bar on a terminal."""

import threading
from pathlib import Path

import pytest

from titan_cpt.common.forked import may_fork
from titan_cpt.data.prepare.progress import report_progress
from titan_cpt.data.prepare.shards import Counts


def test_a_bar_starts_no_thread_and_ends_at_the_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a second thread prepare could not fork its workers, and each would load the tokenizer anew."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    threads = threading.active_count()
    forks = may_fork()

    with report_progress(Path("german"), 100, show=True) as advance:
        advance(40, Counts(documents=2, tokens=300))
        advance(60, Counts(documents=3, tokens=700))
        assert (threading.active_count(), may_fork()) == (threads, forks)

    shown = capsys.readouterr().err
    assert "5 documents, 1,000 tokens" in shown
    assert "100 %" in shown
