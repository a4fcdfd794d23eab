"""What is done about bad numbers: a loss or gradient that is not finite, a loss far above those before it.

Nothing here waits for the device. `UpdateGuard` holds a bad step back, and every step after it, on the device itself;
the host learns of it where it reads the device's numbers anyway, with the weights as they were before that step. It
then stops, or passes over that batch and takes the steps after it again, from these weights or from the last
checkpoint. The outcome does not depend on how often the host looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from titan_cpt.planning.plan import StagePlan
from titan_cpt.training.state import Parts

SPAN_STEPS = 1000  # the stretch of steps over which passed-over batches are counted

Answer = Literal["stop", "skip", "rollback"]


def first_held_back(parts: Parts, stage: StagePlan, lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The first step that the guard held back, if any; spikes that are only to be told are told."""
    training = parts.config.training
    for line in lines:
        if line["held_back"]:
            return line
        score = line.get("loss_z_score")
        if score is not None and score > training.loss_spike_z_score:
            parts.log.event("loss_spike", stage=stage.name, step=line["step"], z_score=score)
            parts.display.say(
                f"  loss spike: {line['loss_nats_per_token']:.4f} at step {line['step']:,} of {stage.name} is "
                f"{score:.1f} standard deviations above the mean of the {training.loss_spike_window} steps before it"
            )
    return None


def answer(parts: Parts, stage: StagePlan, line: dict[str, Any]) -> Answer:
    """What the config asks for, for this step; stop, where the limit of passed-over batches would be exceeded."""
    training = parts.config.training
    asked = training.on_loss_spike if _is_spike(line) else training.on_nonfinite
    assert asked != "log", "a spike that is only logged is not held back"
    step = line["step"] - 1
    passed_over = parts.skips.count(stage.name, after=step - SPAN_STEPS, until=step)
    return "stop" if passed_over >= training.max_skips_per_1000_steps else asked


def pass_over(parts: Parts, stage: StagePlan, line: dict[str, Any]) -> None:
    """Note the batch as one that is skipped from now on, with its sequences, and let updates through again."""
    step = line["step"] - 1
    draws = parts.plan.batch(stage, step)
    windows = parts.reader.windows(draws).tolist()
    sequences = [[draw.source, window] for draw, window in zip(draws, windows, strict=True)]
    hashed = parts.reader.batch_hash(draws)
    parts.skips.add(stage.name, step, why=reason(line), batch_hash=hashed, sequences=sequences)
    parts.log.event("skip_batch", stage=stage.name, step=step + 1, why=reason(line), batch_hash=hashed)
    parts.display.say(f"  batch {step:,} of {stage.name} is skipped: {reason(line)}; its sequences are in skipped.json")
    parts.guard.reset()


def complaint(parts: Parts, stage: StagePlan, line: dict[str, Any], newest: str) -> str:
    """What a user is told when the run stops for this step."""
    step, training = line["step"] - 1, parts.config.training
    passed_over = parts.skips.count(stage.name, after=step - SPAN_STEPS, until=step)
    limit = (
        f"{passed_over} batches of the {SPAN_STEPS} steps before it were skipped, and "
        f"training.max_skips_per_1000_steps is {training.max_skips_per_1000_steps}. "
        if passed_over
        else ""
    )
    return (
        f"stage {stage.name}, step {step} (counted from 0): {reason(line)}. {limit}Neither it nor a later step changed "
        f"a weight; newest checkpoint: {newest}. Look at the batch with `titan-cpt plan --recipe {stage.name} {step}`; "
        "to pass "
        f'over such batches set training.{"on_loss_spike" if _is_spike(line) else "on_nonfinite"} = "skip"; to train '
        f"the stage again with another LR, change it and remove {parts.folder / stage.name}"
    )


def _is_spike(line: dict[str, Any]) -> bool:
    return _finite(line["loss_nats_per_token"]) and _finite(line["grad_norm"])


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def reason(line: dict[str, Any]) -> str:
    """What is wrong with the numbers of a step."""
    numbers = f"the loss is {line['loss_nats_per_token']}, the gradient norm {line['grad_norm']}"
    return f"{numbers}, {line['loss_z_score']:.1f} standard deviations up" if _is_spike(line) else numbers
