"""Where a run continues: its stage and its checkpoint; tests/behavior/test_resume.py resumes real runs."""

from pathlib import Path

import pytest

from titan_cpt.checkpoint.manager import FoundCheckpoint
from titan_cpt.training.resume import first_unfinished_stage


def found(**manifest):
    return FoundCheckpoint(Path("run"), manifest)


@pytest.mark.parametrize(
    ("manifest", "index", "resumes"),
    [
        ({"stage_index": 0, "steps_done": 99}, 0, True),
        ({"stage_index": 0, "steps_done": 100}, 1, False),
        ({"stage_index": 0, "steps_done": 100, "validation_due": True}, 0, True),
        ({"stage_index": 1, "steps_done": 49}, 1, True),
        ({"stage_index": 1, "steps_done": 50, "validation_due": False}, 2, False),
    ],
)
def test_training_continues_with_the_first_unfinished_stage(make, two_stages, manifest, index, resumes):
    """Stages of 100 and 50 steps; a stage whose last validation a signal interrupted is not finished."""
    checkpoint = found(**manifest)

    assert first_unfinished_stage(make(two_stages), checkpoint) == (index, checkpoint if resumes else None)


def test_a_run_without_a_checkpoint_begins(make, two_stages):
    """With its first stage."""
    assert first_unfinished_stage(make(two_stages), None) == (0, None)
