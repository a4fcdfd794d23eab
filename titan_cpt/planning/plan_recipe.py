"""The recipe: every setting that affects the trained weights, by dotted key; a run with a changed recipe cannot resume.

Keys are listed by hand, so that a renamed or new config key does not make existing checkpoints unusable. File paths are
not part of the recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from titan_cpt.common.plugins import FAMILIES, FORMATS, find_plugin
from titan_cpt.common.weights.named_weights import suffix_of
from titan_cpt.config.datasets import OWN_FORMATS, OWN_ORDER, TokenTable
from titan_cpt.config.model import OWN_FAMILIES
from titan_cpt.config.schema import Config
from titan_cpt.config.stages import StageConfig
from titan_cpt.models.spec import ModelSpec
from titan_cpt.planning.lr_schedules import Schedule
from titan_cpt.planning.plan import StageCheckpoint
from titan_cpt.planning.stages.documents import document_recipe
from titan_cpt.planning.stages.lr_span import LRSpan
from titan_cpt.planning.stages.mixture import normalized_weights
from titan_cpt.planning.stages.optimizers import optimizer_hyperparameters, optimizer_recipe
from titan_cpt.planning.stages.own_batch import batch_recipe
from titan_cpt.planning.stages.reptile import reptile_recipe
from titan_cpt.planning.stages.schedule import depends_on_end, final_lr


def base_recipe(config: Config, spec: ModelSpec) -> dict[str, Any]:
    """The recipe of the whole run: model, seed, batch and numerics."""
    filter_fqns = sorted({*config.float8.filter_fqns})
    family = spec.family
    return {
        **spec.as_recipe(),
        **({} if family in OWN_FAMILIES else {"plugins.model.family": find_plugin(FAMILIES, family).origin}),
        "job.seed": config.job.seed,
        "training.global_batch_size": config.training.global_batch_size,
        "training.seq_len": config.training.seq_len,
        "training.max_norm": config.training.max_norm,
        "training.mixed_precision_param": config.training.mixed_precision_param,
        **({"tokenizer.add_bos": True} if config.tokenizer.add_bos else {}),
        **({"float8.recipe_name": config.float8.recipe_name} if config.float8.recipe_name else {}),
        **({"float8.filter_fqns": filter_fqns} if config.float8.recipe_name and filter_fqns else {}),
    }


def lr_recipe(stage: StageConfig, span: LRSpan, schedule: Schedule, points: Mapping[str, Fraction]) -> dict[str, Any]:
    """The recipe of a stage's LR: the schedule with its end points, and the length of its span if that matters.

    The span's length is recorded where other stages share it and it changes an LR of this stage: then a stage that is
    appended to the span changes the LR of steps that are trained already, and the run refuses it.

    Args:
        points: end points of the schedule, in steps of the span.
    """
    trained = span.steps_before(stage.name) + span.lengths[span.names.index(stage.name)].steps
    shared = len(span.lengths) > 1 and depends_on_end(schedule, trained)
    length = {"lr.span_steps": span.steps} if shared else {}
    if stage.name != span.first.name:
        return {"lr.schedule": "continue", **length}
    lr = stage.lr.model_dump(exclude_none=True) | {name: str(point) for name, point in points.items()}
    return {**{f"lr.{key}": value for key, value in sorted(lr.items())}, "lr.min": final_lr(stage), **length}


def stage_recipe(
    config: Config,
    stage: StageConfig,
    steps: int,
    init: StageCheckpoint | str,
    lr: Mapping[str, Any],
    weights: Mapping[str, Fraction],
) -> dict[str, Any]:
    """The recipe of one stage: steps, data, LR, optimizer and initial weights.

    Args:
        lr: see `lr_recipe`.
        weights: of the stage's new data, as the plan computed them.
    """
    replay = stage.replay if stage.replay and stage.replay.fraction else None
    replayed = (replay.from_ if replay else None) or ()
    names = sorted({*stage.dataset, *replayed})
    return {
        "steps": steps,
        **batch_recipe(config, stage),
        "dataset": {name: str(weight) for name, weight in sorted(weights.items())},
        "domain_weights": {
            name: {domain: table.weight for domain, table in sorted(config.datasets[name].domains.items())}
            for name in names
            if config.datasets[name].domains
        },
        **_stored_orders(config, names),
        **_registered_formats(config, names),
        **document_recipe(config, stage),
        **{f"packing.{name}": table.packing for name, table in _sources(config, names) if table.packing != "concat"},
        "init": init if isinstance(init, str) else f"{init.stage}@{init.steps_done}{suffix_of(init.average)}",
        **({"weak_rows": "mean"} if stage.weak_rows == "mean" else {}),
        "optimizer_state": stage.optimizer_state,
        **reptile_recipe(stage),
        **optimizer_recipe(optimizer_hyperparameters(config, stage)),
        **lr,
        "replay.fraction": replay.fraction if replay else 0.0,
        "replay.from": _as_text(replayed) if isinstance(replayed, dict) else sorted(replayed),
        "replay.order": replay.order if replay else "as_trained",
    }


def _as_text(names: Sequence[str] | Mapping[str, float]) -> dict[str, str]:
    """Exact weights by name, sorted, so that the order in the file does not matter."""
    return {name: str(weight) for name, weight in sorted(normalized_weights(names).items())}


def _sources(config: Config, names: Sequence[str]) -> Iterator[tuple[str, TokenTable]]:
    for name in names:
        yield name, config.datasets[name]
        yield from ((f"{name}.{domain}", table) for domain, table in config.datasets[name].domains.items())


def _stored_orders(config: Config, names: Sequence[str]) -> dict[str, str]:
    """The kind and order of sequences, of every source whose sequences are not shuffled windows of its tokens."""
    orders = {}
    for source, table in _sources(config, names):
        if table.format in OWN_ORDER or table.in_stored_order:
            kind = table.format if table.format in OWN_ORDER else "windows"
            orders[f"order.{source}"] = f"{kind}, {'as stored' if table.in_stored_order else 'shuffled'}"
    return orders


def _registered_formats(config: Config, names: Sequence[str]) -> dict[str, str]:
    """The package of every source whose format another package registers."""
    return {
        f"format.{source}": f"{table.format} of {find_plugin(FORMATS, table.format).origin}"
        for source, table in _sources(config, names)
        if table.format not in OWN_FORMATS
    }
