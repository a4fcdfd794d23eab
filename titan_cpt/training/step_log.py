"""What a step and a measurement leave behind: lines of metrics.jsonl, and the losses that forgetting is told from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from titan_cpt.distributed.process_group import any_rank_stops
from titan_cpt.planning.plan import StagePlan
from titan_cpt.training.state import Parts
from titan_cpt.training.validation import ValidationLoss


@dataclass(frozen=True)
class StepResult:
    """Numbers of one step, still on the device: mean loss in nats per token, gradient norm before clipping, health."""

    loss: Tensor
    grad_norm: Tensor
    health: Tensor | None
    """What `UpdateGuard.observe` told; None for a batch that is passed over."""


def record(parts: Parts, stage: StagePlan, step: int, result: StepResult) -> None:
    """Keep a step for metrics.jsonl; the device is not waited for."""
    plan = parts.plan
    run_step = plan.steps_before(stage) + step + 1
    draws = plan.batch(stage, step) if parts.ranks.rank == 0 else []
    numbers = {
        "stage": stage.name,
        "step": step + 1,
        "run_step": run_step,
        "tokens": run_step * plan.step_tokens,
        "replayed_tokens": sum(draw.replayed for draw in draws) * plan.seq_len,
        "lr": parts.optimizer.param_groups[0]["lr"],
        "batch_hash": parts.reader.batch_hash(draws),
    }
    if result.health is None:
        numbers["skipped"] = True
    parts.log.step(numbers, loss=result.loss, grad_norm=result.grad_norm, tokens=plan.step_tokens, health=result.health)


def validate(parts: Parts, stage: StagePlan, done: int) -> bool:
    """Measure every dataset and write down its loss, and how much of it was forgotten.

    Returns:
        False where a signal cut it short: nothing is written then, and it is due still.
    """
    run_step = parts.plan.steps_before(stage) + done
    losses = parts.validator.measure(parts.engine, interrupted=partial(any_rank_stops, parts.stop))
    if losses is None:
        return False
    said = []
    for dataset, loss in losses.items():
        line = validation_line(parts, stage, done, dataset, loss)
        parts.log.validation(line, run_step)
        forgetting = line["forgetting_nats_per_token"]
        said.append(f"{dataset} {loss.nats_per_token:.4f}" + ("" if forgetting is None else f" ({forgetting:+.4f})"))
    if said:
        parts.display.say(f"  validation after step {done:,} of {stage.name}: {', '.join(said)}")
    parts.log.restart_clock()
    return True


def validation_line(parts: Parts, stage: StagePlan, done: int, dataset: str, loss: ValidationLoss) -> dict[str, Any]:
    """A dataset's loss as metrics.jsonl has it; at step 0 it is kept as a baseline of forgetting.

    Forgetting is None where the baseline was measured on other data or windows, or is not known.
    """
    since, identity = parts.plan.forgetting_since(stage, dataset), parts.validator.identities[dataset]
    if done == 0:
        parts.log.before[stage.name, dataset] = loss.nats_per_token, identity
    before, measured_on = (None, None) if since is None else parts.log.before.get((since, dataset), (None, None))
    comparable = before is not None and measured_on == identity
    return {
        "stage": stage.name,
        "step": done,
        "dataset": dataset,
        "loss_nats_per_token": loss.nats_per_token,
        "perplexity": loss.perplexity,
        "bits_per_byte": loss.bits_per_byte,
        "forgetting_nats_per_token": loss.nats_per_token - before if comparable and before is not None else None,
        "validation_id": identity,
    }
