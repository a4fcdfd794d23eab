"""During a step, calls go outward from train.py and nothing calls back: few files, no two that call each other."""

import sys
from pathlib import Path

import pytest
import training

import titan_cpt
from titan_cpt.training.stage_start import begin_stage

ROOT = Path(titan_cpt.__file__).parent
pytestmark = training.THEIR_WARNINGS_IGNORED


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_enters_few_files_and_none_calls_back(tmp_path, precision):
    """At most 18 of our files, three of them to read tokens, and no pair of files with calls in both directions."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw["training"]["mixed_precision_param"] = precision
    with training.built_trainer(training.config_of(raw)) as trainer:
        stage = trainer.plan.stages[0]
        begin_stage(trainer, stage)
        loader = training.loader_of(trainer, stage)
        calls = called_files(lambda: trainer.train_step(loader, stage, 0))
    entered = {callee for _, callee in calls}

    assert len(entered) <= 18, "\n".join(sorted(entered))
    assert not {(caller, callee) for caller, callee in calls if (callee, caller) in calls}


def called_files(function):
    """(calling file, called file) of every call between two different files of the package."""
    calls = set()

    def note(frame, event, _argument):
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT)):
            caller = frame.f_back
            while caller is not None and not caller.f_code.co_filename.startswith(str(ROOT)):
                caller = caller.f_back
            if caller is not None and caller.f_code.co_filename != frame.f_code.co_filename:
                calls.add((ours(caller), ours(frame)))

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def ours(frame):
    return str(Path(frame.f_code.co_filename).relative_to(ROOT))
