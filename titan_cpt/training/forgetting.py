"""Forgetting: the validation loss of every dataset, minus its loss when the weights left the dataset.

    forgetting(dataset, step) = loss(dataset, step) - loss(dataset, step 0 of the first later stage)

`validation.py` computes the losses. If the validation data changes between two sessions, `changed_validation.py`
measures the second loss, the baseline, again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from titan_cpt.common.weights.named_weights import AVERAGE_SUFFIX, split_average
from titan_cpt.data.batch import Batch
from titan_cpt.distributed.process_group import any_rank_stops
from titan_cpt.evaluation.registered_metrics import MetricContext, measure
from titan_cpt.planning.plan import StagePlan
from titan_cpt.training.forward_backward import SingleStageRunner
from titan_cpt.training.state import TrainerState
from titan_cpt.training.validation import ValidationLoss, Validator


def validate(state: TrainerState, stage: StagePlan, steps_done: int) -> bool:
    """Measure and log the validation loss of every dataset, and its forgetting.

    Returns:
        False if a signal interrupted the measurement: nothing is logged, and the next session measures again.
    """
    run_step = state.plan.steps_before(stage) + steps_done
    with state.display.timed("validation"):
        losses = _losses(state, stage)
    if losses is None:
        return False
    shown: tuple[list[str], list[str]] = [], []  # of the weights, of their average
    for label, loss in losses.items():
        line = validation_line(state, stage, steps_done, label, loss)
        state.log.validation(line, run_step)
        forgetting = line["forgetting_nats_per_token"]
        dataset, is_average = split_average(label)
        text = f"{dataset} {loss.nats_per_token:.4f}" + ("" if forgetting is None else f" ({forgetting:+.4f})")
        shown[is_average].append(text)
    say = state.display.result if steps_done == stage.steps else state.display.say
    for texts, weights in zip(shown, ("", ", average of the weights"), strict=True):
        if texts:
            say(f"  validation after step {steps_done:,} of {stage.name}{weights}: {', '.join(texts)}", wrap=True)
    complete = _measure_registered(state, stage, steps_done)
    state.log.restart_clock()
    return complete


def _losses(state: TrainerState, stage: StagePlan) -> dict[str, ValidationLoss] | None:
    """The losses of the weights, and those of their average, if there is one; None if a signal interrupted that."""
    measure_losses = partial(
        state.validator.measure, state.runner, stage.name, interrupted=partial(any_rank_stops, state.stop)
    )
    losses = measure_losses()
    if losses is None or not state.copies.has_average:
        return losses
    with state.copies.averaged():
        of_average = measure_losses()
    return (
        None if of_average is None else losses | {f"{name}{AVERAGE_SUFFIX}": loss for name, loss in of_average.items()}
    )


def _measure_registered(state: TrainerState, stage: StagePlan, steps_done: int) -> bool:
    """Measure and log the metrics of other packages; False if a signal interrupted that."""
    runner = state.runner
    run_step = state.plan.steps_before(stage) + steps_done
    for name, metric in state.metrics.items():
        if any_rank_stops(state.stop):
            return False
        assert isinstance(runner, SingleStageRunner), "the plan permits no pipeline parallelism with metrics"
        context = MetricContext(
            stage=stage.name,
            step=steps_done,
            run_step=run_step,
            config=state.config,
            model=runner.model,
            device=state.process.device,
            datasets=tuple(state.validator.streams),
            rank=state.process.rank,
            world_size=state.process.world_size,
            logits=partial(_logits, runner, state.validator),
            batches=state.validator.batches,
        )
        values, failure = measure(name, metric, context)
        where = {"stage": stage.name, "step": steps_done, "metric": name}
        for key, value in values.items():
            state.log.metric({**where, "name": key, "value": value}, run_step)
        if failure:
            state.log.event("metric_failed", **where, why=failure)
            state.display.warn(f"  metric {name} failed: {failure}")
        elif values:
            shown = ", ".join(f"{key} {value:.4f}" for key, value in values.items())
            state.display.say(f"  {name} after step {steps_done:,} of {stage.name}: {shown}")
    return True


def _logits(runner: SingleStageRunner, validator: Validator, inputs_BL: Tensor) -> Tensor:
    """The logits of token ids, computed as the validation loss is."""
    return runner.logits(validator.with_documents(Batch(inputs_BL, inputs_BL)))


def validation_line(
    state: TrainerState, stage: StagePlan, steps_done: int, dataset: str, loss: ValidationLoss
) -> dict[str, Any]:
    """The line of metrics.jsonl for a dataset's validation loss; at step 0 the loss becomes a baseline of forgetting.

    Forgetting is None if its baseline is unknown or was measured on other validation data or windows.
    """
    measured_label = split_average(dataset)[0]  # an average forgets what the weights knew before the stage
    identity = state.validator.identities[measured_label]
    if steps_done == 0:
        state.log.baselines[stage.name, dataset] = loss.nats_per_token, identity
    baseline_stage = state.plan.forgetting_since(stage, measured_label)
    baseline: float | None = None
    if baseline_stage is not None:
        measured, measured_on = state.log.baselines.get((baseline_stage, measured_label), (None, None))
        baseline = measured if measured_on == identity else None
    return {
        "stage": stage.name,
        "step": steps_done,
        "dataset": dataset,
        "loss_nats_per_token": loss.nats_per_token,
        "perplexity": loss.perplexity,
        "bits_per_byte": loss.bits_per_byte,
        "forgetting_nats_per_token": None if baseline is None else loss.nats_per_token - baseline,
        "validation_id": identity,
    }
