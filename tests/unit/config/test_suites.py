"""The benchmark suites, and tasks chosen on the command line."""

import pytest

from titan_cpt.config.suites import SUITES, Task, chosen_tasks, suite_of
from titan_cpt.errors import ConfigError
from titan_cpt.evaluation.scores import file_name


def test_the_papers_suites_have_its_tasks_shots_and_metrics():
    """Thirteen English tasks and three German ones."""
    english = {task.name: (task.shots, task.metric) for task in SUITES["paper_english"]}

    assert len(english) == 13
    assert english["hellaswag"] == (0, "acc_norm")
    assert {name for name, (shots, _) in english.items() if shots == 5} == {"nq_open", "triviaqa", "mmlu"}
    assert {name for name, (_, metric) in english.items() if metric == "exact_match"} == {"nq_open", "triviaqa"}
    assert SUITES["paper_german"] == (
        Task("hellaswag_de", 0, "acc_norm"),
        Task("arc_de", 0, "acc"),
        Task("m_mmlu_de", 5, "acc"),
    )


def test_tasks_are_chosen_by_name():
    """Tasks of a suite, or tasks without a suite with shots and metric; their score files have different names."""
    assert chosen_tasks("paper_german", ["arc_de"]) == (Task("arc_de", 0, "acc"),)
    assert chosen_tasks(None, ["a", "b:3", "c:0:acc_norm"]) == (Task("a"), Task("b", 3), Task("c", 0, "acc_norm"))
    assert len({file_name("a", shots, limit) for shots in (None, 0, 5) for limit in (None, 5)}) == 6
    with pytest.raises(ConfigError, match="paper_english"):
        suite_of("papers")
