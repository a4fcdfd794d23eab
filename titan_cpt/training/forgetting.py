"""Baselines of forgetting when what validation measures has changed: other data, windows or tokenizer under one run.

A change alters no weight, so no run is refused; but losses of two identities are never subtracted from each other. The
weights that a baseline belongs to still exist, in the checkpoint from which the stage began: the baseline is measured
again on the new data, before training resumes. Where that checkpoint was removed, forgetting is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from titan_cpt.checkpoint import manifest
from titan_cpt.common.run_folder import MANIFEST_FILE, checkpoint_folder, checkpoint_folders
from titan_cpt.distributed.float8 import refresh_scales
from titan_cpt.distributed.process_group import any_rank_stops
from titan_cpt.errors import TitanError
from titan_cpt.planning.plan import Plan, StageCheckpoint, StagePlan
from titan_cpt.training.initial_weights import load_initial
from titan_cpt.training.state import Parts
from titan_cpt.training.step_log import validation_line

_BRANCHES_FOLLOWED = 50  # a longer chain of runs is a circle


def note_changed_validation(parts: Parts, stage: StagePlan, done: int) -> None:
    """Record and print that validation measures something else than in the session before; the curves get a mark.

    Args:
        stage: where training resumes, after `done` of its steps.
    """
    changed = changed_datasets(parts.log.last_start, parts.identities, parts.validator.identities)
    changed = sorted({*changed, *_other_windows(parts)})
    if changed:
        parts.log.event("validation_changed", stage=stage.name, step=done, datasets=changed)
        parts.display.say(
            f"what validation measures has changed for {', '.join(changed)} (data, windows or tokenizer): losses "
            f"before and after step {done:,} of {stage.name} are not comparable"
        )


def changed_datasets(
    last_start: Mapping[str, Any], data: Mapping[str, str], identities: Mapping[str, str]
) -> list[str]:
    """The datasets that this session and the one before both measure, and not alike.

    Args:
        last_start: the `start` event of the session before; of an older version, it names the data and not the windows.
        data: fingerprints of this session's data.
        identities: of what this session measures.
    """
    if "validation" in last_start:
        before, now = last_start["validation"], dict(identities)
    else:
        before, now = (
            {name: fingerprints[key] for name in identities if (key := f"datasets.{name}.validation") in fingerprints}
            for fingerprints in (last_start.get("data", {}), data)
        )
    return sorted(name for name in now if name in before and before[name] != now[name])


def _other_windows(parts: Parts) -> list[str]:
    """The datasets of which a session of an older version measured another number of windows, as its config says."""
    last_start, validator = parts.log.last_start, parts.validator
    before = last_start.get("validation_sequences")
    if before is None:
        return []
    measured = [name for name in validator.streams if f"datasets.{name}.validation" in last_start.get("data", {})]
    available = {name: validator.streams[name].windows(validator.seq_len) for name in measured}
    return [name for name, windows in available.items() if min(windows, before) != min(windows, validator.sequences)]


def renew_baselines(parts: Parts, stage: StagePlan, *, resumes: bool) -> None:
    """Measure again every baseline that later measurements need and that belongs to another identity; collective.

    To be called before the weights are loaded with which training resumes: the model holds others afterwards.

    Args:
        stage: the one that is trained next; it `resumes` from a checkpoint, or begins.
    """
    needed: list[Any] = [_needed(parts, stage, resumes=resumes)]
    if dist.is_initialized():
        dist.broadcast_object_list(needed, src=0, group=parts.checkpoints.group)
    for name, (datasets, init) in needed[0].items():
        since = parts.plan.stage(name)
        try:
            weights = load_initial(parts, replace(since, init=init, keep_optimizer=False))
        except TitanError as error:
            parts.display.say(
                f"forgetting of {', '.join(datasets)} is unknown from here on: its loss at the start of stage {name} "
                f"was measured on something else, and these weights cannot be loaded to measure it again: {error}"
            )
            continue
        if parts.config.float8.enable_fsdp_float8_all_gather:
            refresh_scales(parts.model)
        losses = parts.validator.measure(parts.engine, interrupted=partial(any_rank_stops, parts.stop))
        if losses is None:
            return  # a signal: the next session finds the same baselines missing
        for dataset, loss in losses.items():
            line = validation_line(parts, since, 0, dataset, loss)
            parts.log.validation({**line, "measured_again": True}, parts.plan.steps_before(since))
        said = ", ".join(f"{dataset} {losses[dataset].nats_per_token:.4f}" for dataset in datasets)
        parts.display.say(f"measured again at the start of stage {name}, {weights}: {said}")


def _needed(parts: Parts, stage: StagePlan, *, resumes: bool) -> dict[str, tuple[list[str], str]]:
    """By stage that has begun, the datasets whose loss at its step 0 is needed and not known for today's identity.

    With them, where the stage's first weights are, as an `init` says it.
    """
    plan, needed = parts.plan, dict[str, tuple[list[str], str]]()
    begun = plan.stages.index(stage) + resumes
    for name, dataset in _baselines(plan, plan.stages.index(stage), parts.validator.identities):
        _, measured_on = parts.log.before.get((name, dataset), (None, None))
        since = plan.stage(name)
        if plan.stages.index(since) < begun and measured_on != parts.validator.identities[dataset]:
            needed.setdefault(name, ([], _first_weights(parts, since)))[0].append(dataset)
    return needed


def _baselines(plan: Plan, first: int, datasets: Mapping[str, str]) -> list[tuple[str, str]]:
    """(stage, dataset) of every baseline that measurements from stage `first` on are compared with, each once."""
    found = (
        (since, dataset)
        for stage in plan.stages[first:]
        for dataset in datasets
        if (since := plan.forgetting_since(stage, dataset)) is not None
    )
    return list(dict.fromkeys(found))


def _first_weights(parts: Parts, stage: StagePlan) -> str:
    """A stage's `init`, with a checkpoint in the place of a stage: of this run, or of one it branched off from."""
    if not isinstance(stage.init, StageCheckpoint):
        return stage.init
    folder = checkpoint_folder(parts.folder, stage.init.stage, stage.init.steps_done)
    run: Path | None = parts.folder
    for _ in range(_BRANCHES_FOLLOWED):
        if run is None:
            break
        if (found := checkpoint_folder(run, stage.init.stage, stage.init.steps_done) / MANIFEST_FILE).exists():
            return f"checkpoint:{found.parent}"
        run = _branched_from(run)
    return f"checkpoint:{folder}"


def _branched_from(run: Path) -> Path | None:
    for folder in checkpoint_folders(run):
        try:
            checkpoint = manifest.read(folder).get("branched_from")
        except TitanError:
            continue  # damaged: whoever resumes from it reports that
        if isinstance(checkpoint, str):
            return Path(checkpoint).resolve().parents[1]
    return None
