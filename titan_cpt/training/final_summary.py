"""summary.json, and what a run prints when it ends."""

from __future__ import annotations

import json

from titan_cpt.common.console import make_console
from titan_cpt.common.files import write_text_atomically
from titan_cpt.common.run_folder import SUMMARY_FILE
from titan_cpt.reporting.summary import print_summary, summarize
from titan_cpt.training.state import TrainerState


def write_summary(state: TrainerState) -> None:
    """Write summary.json: losses, forgetting and adaptation of all stages so far."""
    if state.process.rank == 0:
        write_text_atomically(state.folder / SUMMARY_FILE, json.dumps(summarize(state.folder), indent=1))


def print_final_summary(state: TrainerState) -> None:
    """Print the table of losses and where everything is."""
    if state.process.rank == 0:
        print_summary(summarize(state.folder), make_console())
    print_newest_checkpoint(state)
    state.display.say(f"this table again: titan-cpt report {state.folder}")
    if state.config.metrics.enable_tensorboard:
        state.display.say(f"the curves: tensorboard --logdir {state.folder / 'tb'}")


def print_newest_checkpoint(state: TrainerState) -> None:
    """Print the folder of the newest checkpoint, if there is one."""
    newest = next((found.folder for found in state.checkpoints.listed()), None) if state.process.rank == 0 else None
    if newest is not None:
        state.display.say(f"newest checkpoint: {newest}")
