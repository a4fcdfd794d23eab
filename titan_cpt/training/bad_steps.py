"""Response to a bad step, one with a loss or gradient that is not finite or with a loss spike: stop, skip, roll back.

`UpdateGuard` detects a bad step on the device, without a host sync, and prevents its update and all later ones. The
host learns of it at the next logging step, when the weights are still those before the bad step. The run then stops, or
skips the bad batch and repeats the steps after it, from these weights or from the last checkpoint. The result does not
depend on how often metrics are logged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NoReturn

from titan_cpt.common.run_folder import INTERVAL
from titan_cpt.errors import NumericsError
from titan_cpt.planning.plan import StagePlan
from titan_cpt.training.due import checkpoint_due
from titan_cpt.training.saving import save_checkpoint
from titan_cpt.training.stage_start import begin_stage, resume_stage
from titan_cpt.training.state import TrainerState

SKIP_LIMIT_STEPS = 1000  # the window of training.max_skips_per_1000_steps

Response = Literal["stop", "skip", "rollback"]


def first_held_back(state: TrainerState, stage: StagePlan, lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Metrics of the first step whose update the guard prevented, if any; logs spikes when on_loss_spike = "log"."""
    training = state.config.training
    for line in lines:
        if line["held_back"]:
            return line
        score = line.get("loss_z_score")
        if score is not None and score > training.loss_spike_z_score:
            state.log.event("loss_spike", stage=stage.name, step=line["step"], z_score=score)
            state.display.warn(
                f"  loss spike: {line['loss_nats_per_token']:.4f} at step {line['step']:,} of {stage.name} is "
                f"{score:.1f} standard deviations above the mean of the {training.loss_spike_window} steps before it"
            )
    return None


def handle_bad_step(state: TrainerState, stage: StagePlan, line: dict[str, Any]) -> int:
    """Stop, skip the batch, or roll back and skip it, as the config says.

    Args:
        line: the bad step's metrics; its `step` is 1-based.

    Returns:
        The number of steps done from which the stage continues; negative as `begin_stage` returns it.

    Raises:
        NumericsError: the response is to stop, or too many batches were skipped. The weights are those before the step.
    """
    response = choose_response(state, stage, line)
    if response == "stop":
        _stop_before(state, stage, line)
    skip_from_now_on(state, stage, line)
    if response == "skip":
        state.log.rewind(int(line["run_step"]) - 1)
        return int(line["step"]) - 1
    state.checkpoints.wait()
    checkpoint = state.checkpoints.newest_valid(state.display.warn)
    if checkpoint is not None and checkpoint.manifest["stage"] == stage.name:
        return resume_stage(state, checkpoint)
    return begin_stage(state, stage)


def choose_response(state: TrainerState, stage: StagePlan, line: dict[str, Any]) -> Response:
    """The configured response to a bad step; "stop" if skipping it would exceed training.max_skips_per_1000_steps."""
    training = state.config.training
    configured = training.on_loss_spike if _is_spike(line) else training.on_nonfinite
    assert configured != "log", "a spike that is only logged is not held back"
    return "stop" if _recently_skipped(state, stage, line) >= training.max_skips_per_1000_steps else configured


def skip_from_now_on(state: TrainerState, stage: StagePlan, line: dict[str, Any], **details: bool) -> None:
    """Record the batch as skipped, with its sequences and `details`, and let the optimizer update weights again."""
    step = line["step"] - 1
    draws = state.plan.batch(stage, step)
    reader = state.readers[stage.name]
    sequences = reader.sequences(draws)
    batch_hash = reader.batch_hash(draws)
    why = reason(line)
    state.skipped.add(stage.name, step, why=why, batch_hash=batch_hash, sequences=sequences, **details)
    state.log.event("skip_batch", stage=stage.name, step=step + 1, why=why, batch_hash=batch_hash)
    state.display.warn(f"  batch {step:,} of {stage.name} is skipped: {why}; its sequences are in skipped.json")
    state.guard.reset()


def _stop_before(state: TrainerState, stage: StagePlan, line: dict[str, Any]) -> NoReturn:
    """Save the weights, which are still those before the bad step, and raise NumericsError."""
    steps_done = line["step"] - 1
    if steps_done and checkpoint_due(state.config, stage, steps_done) is None:
        save_checkpoint(state, stage, steps_done, INTERVAL)  # else the loop has saved one after that step
    state.checkpoints.poll(until_done=True)
    newest = next(
        (str(checkpoint.folder) for checkpoint in state.checkpoints.listed()), "none, as it was the first step"
    )
    state.log.event("stop", stage=stage.name, step=steps_done, why=reason(line))
    raise NumericsError(stop_message(state, stage, line, newest))


def stop_message(state: TrainerState, stage: StagePlan, line: dict[str, Any], newest: str) -> str:
    """The error message of a run that stops at this step.

    Args:
        newest: path of the newest checkpoint, or a note that there is none.
    """
    step = line["step"] - 1
    limit = skip_limit_reached(state, stage, line)
    key = "on_loss_spike" if _is_spike(line) else "on_nonfinite"
    return (
        f"stage {stage.name}, step {step} (counted from 0): {reason(line)}. {limit}Neither it nor a later step changed "
        f"a weight; newest checkpoint: {newest}. Look at the batch with `titan-cpt plan --batch {stage.name} {step}`; "
        f'to skip such batches set training.{key} = "skip"; to train the stage again with another LR, change it and '
        f"remove {state.folder / stage.name}"
    )


def skip_limit_reached(state: TrainerState, stage: StagePlan, line: dict[str, Any]) -> str:
    """A sentence about the batches skipped before this one, for the error message of a run that stops; may be empty."""
    if not (skipped := _recently_skipped(state, stage, line)):
        return ""
    return (
        f"{skipped} batches of the {SKIP_LIMIT_STEPS} steps before it were skipped, and "
        f"training.max_skips_per_1000_steps is {state.config.training.max_skips_per_1000_steps}. "
    )


def reason(line: dict[str, Any]) -> str:
    """Why a step is bad: its loss, its gradient norm, and for a spike the z-score."""
    values = f"the loss is {line['loss_nats_per_token']}, the gradient norm {line['grad_norm']}"
    return f"{values}, {line['loss_z_score']:.1f} standard deviations up" if _is_spike(line) else values


def _recently_skipped(state: TrainerState, stage: StagePlan, line: dict[str, Any]) -> int:
    """Batches skipped in the steps before this one, also in earlier stages whose LR schedule this stage continues."""
    count = 0
    for earlier in state.plan.schedule_span(stage):
        step = line["step"] - 1 + stage.schedule_offset - earlier.schedule_offset  # in steps of the earlier stage
        count += state.skipped.count(earlier.name, after=step - SKIP_LIMIT_STEPS, until=step)
    return count


def _is_spike(line: dict[str, Any]) -> bool:
    return _finite(line["loss_nats_per_token"]) and _finite(line["grad_norm"])


def _finite(value: float) -> bool:
    return abs(value) < float("inf")
