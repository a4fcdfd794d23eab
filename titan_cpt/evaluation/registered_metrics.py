"""Metrics that other packages register: functions of the model and the validation data, called at every validation.

docs/library.md has an example. A metric changes nothing in training: it gets the model in evaluation mode, without
gradients, and the states of all random number generators are restored after it. An error in it is reported, and
training continues.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_cpt.common.plugins import METRICS, find_plugin
from titan_cpt.config.schema import Config
from titan_cpt.distributed.process_group import first_failure
from titan_cpt.errors import ConfigError, PlanError
from titan_cpt.evaluation.evaluate import fixed_random_state

IGNORED_TARGET = -100
"""The target of sequences that only fill up a rank's last batch; `torch.nn.functional.cross_entropy` ignores it too."""


@dataclass(frozen=True)
class MetricContext:
    """What a metric is computed from. Every rank calls the metric, each with its share of the sequences.

    Attributes:
        stage: name of the stage.
        step: steps of the stage that are done.
        run_step: steps of the run that are done.
        config: of the run.
        model: the model in evaluation mode; its weights are sharded if there are several ranks.
        device: the device of this rank.
        datasets: names of the datasets, or `dataset.domain`, that have validation data.
        rank: of this process, from 0.
        world_size: number of processes.
        logits: token ids [B, L], int64 -> logits of the next token [B, L, V], computed as the validation loss is;
            collective.
        batches: dataset -> this rank's share of its validation sequences, as pairs (inputs_BL, targets_BL), int64. All
            ranks get as many batches; targets are `IGNORED_TARGET` in sequences that only fill up a batch.
    """

    stage: str
    step: int
    run_step: int
    config: Config
    model: nn.Module
    device: torch.device
    datasets: tuple[str, ...]
    rank: int
    world_size: int
    logits: Callable[[Tensor], Tensor]
    batches: Callable[[str], Iterator[tuple[Tensor, Tensor]]]

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Sums of these values over all ranks; collective. Ranks that share sequences add them several times.

        A ratio of two sums, such as correct tokens by all tokens, is therefore right under every parallelism.
        """
        sums = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(sums)
        return [float(each) for each in sums.tolist()]


Metric = Callable[[MetricContext], Mapping[str, float]]
"""A metric: from the context to a number for each name, the same on every rank."""


def load_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """The metrics of these names.

    Raises:
        ConfigError: one is not registered, or cannot be loaded.
    """
    return {name: find_plugin(METRICS, name).load() for name in names}


def measure(name: str, metric: Metric, context: MetricContext) -> tuple[dict[str, float], str]:
    """The metric's values, and the reason why there are none; "" if there are. Collective.

    Raises:
        ConfigError: it failed on one rank, and others wait in a collective operation of it.
    """
    values, failure = _measure_here(metric, context)
    try:
        failed = first_failure(failure, timeout_s=context.config.comm.train_timeout_seconds)
    except PlanError as error:
        raise ConfigError(
            f"validation.metrics: {name!r} did not end on every rank: {error}. Correct the metric, or remove it from "
            "validation.metrics; the run resumes from its newest checkpoint"
        ) from None
    if failed:
        return {}, failed
    nonfinite = [key for key, value in values.items() if not math.isfinite(value)]
    return values, f"not finite: {', '.join(nonfinite)}" if nonfinite else ""


def _measure_here(metric: Metric, context: MetricContext) -> tuple[dict[str, float], str]:
    """As `measure`, without the other ranks."""
    with fixed_random_state(), in_evaluation_mode(context.model), torch.no_grad():
        try:
            return {str(key): float(value) for key, value in metric(context).items()}, ""
        except Exception as error:  # the metric is not ours
            return {}, f"{type(error).__name__}: {error}"


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation mode; afterwards each of its modules has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
