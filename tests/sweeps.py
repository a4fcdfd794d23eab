"""What tests of sweeps share: the key that most of them sweep, and the command line in this process."""

import pytest
import training

from titan_cpt.cli import main

FRACTION = "stages.german.replay.fraction"


def status_of(*words):
    """The exit status of titan-cpt with these arguments."""
    with pytest.raises(SystemExit) as leaving:
        main([str(word) for word in words])
    return leaving.value.code


def stages_trained_in(run):
    """Names of the stages that were trained in this run folder, from the `transition` events."""
    return [event["stage"] for event in training.events_of(run, "transition")]
