"""Baselines of forgetting when the validation data, its windows or the tokenizer changed between two sessions.

Such a change alters no weight, so the run is not refused; but losses measured on different data are never subtracted
from each other. The weights of a baseline still exist, in the checkpoint from which the stage began: before training
resumes, the baseline is measured again on the new data. If that checkpoint was removed, forgetting is unknown.
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
from titan_cpt.training.stage_start import load_initial
from titan_cpt.training.state import TrainerState
from titan_cpt.training.step_log import validation_line

_BRANCHES_FOLLOWED = 50  # a longer chain of runs is a cycle


def note_changed_validation(state: TrainerState, stage: StagePlan, steps_done: int) -> None:
    """Log and print which validation sets changed since the last session; the TensorBoard curves get a mark.

    Args:
        stage: the stage in which training resumes, after `steps_done` of its steps.
    """
    changed = changed_datasets(state.log.last_start, state.identities, state.validator.identities)
    changed = sorted({*changed, *_other_windows(state)})
    if changed:
        state.log.event("validation_changed", stage=stage.name, step=steps_done, datasets=changed)
        state.display.say(
            f"the validation set has changed for {', '.join(changed)} (data, windows or tokenizer): losses "
            f"before and after step {steps_done:,} of {stage.name} are not comparable"
        )


def changed_datasets(
    last_start: Mapping[str, Any], data: Mapping[str, str], identities: Mapping[str, str]
) -> list[str]:
    """The datasets whose validation set differs between this session and the last one, among those that both measure.

    Args:
        last_start: the `start` event of the last session; older versions logged the data and not the windows.
        data: fingerprints of this session's data.
        identities: of this session's validation sets.
    """
    if "validation" in last_start:
        before, now = last_start["validation"], dict(identities)
    else:
        before, now = (
            {name: fingerprints[key] for name in identities if (key := f"datasets.{name}.validation") in fingerprints}
            for fingerprints in (last_start.get("data", {}), data)
        )
    return sorted(name for name in now if name in before and before[name] != now[name])


def _other_windows(state: TrainerState) -> list[str]:
    """The datasets of which an older version's session measured another number of windows, according to its config."""
    last_start, validator = state.log.last_start, state.validator
    before = last_start.get("validation_sequences")
    if before is None:
        return []
    measured = [name for name in validator.streams if f"datasets.{name}.validation" in last_start.get("data", {})]
    available = {name: validator.streams[name].windows(validator.seq_len) for name in measured}
    return [name for name, windows in available.items() if min(windows, before) != min(windows, validator.sequences)]


def renew_baselines(state: TrainerState, stage: StagePlan, *, resumes: bool) -> None:
    """Measure again every baseline that was measured on other data and that later measurements need; collective.

    Call it before the weights of the next stage are loaded: it loads others into the model.

    Args:
        stage: the stage that is trained next.
        resumes: the stage continues from a checkpoint of its own.
    """
    needed: list[Any] = [_needed(state, stage, resumes=resumes)]
    if dist.is_initialized():
        dist.broadcast_object_list(needed, src=0, group=state.checkpoints.group)
    for name, (datasets, init) in needed[0].items():
        since = state.plan.stage(name)
        try:
            weights = load_initial(state, replace(since, init=init, keep_optimizer=False))
        except TitanError as error:
            state.display.say(
                f"forgetting of {', '.join(datasets)} is unknown from here on: its loss at the start of stage {name} "
                f"was measured on something else, and these weights cannot be loaded to measure it again: {error}"
            )
            continue
        if state.config.float8.enable_fsdp_float8_all_gather:
            refresh_scales(state.model)
        losses = state.validator.measure(state.runner, interrupted=partial(any_rank_stops, state.stop))
        if losses is None:
            return  # a signal: the next session finds the same baselines missing
        for dataset, loss in losses.items():
            line = validation_line(state, since, 0, dataset, loss)
            state.log.validation({**line, "measured_again": True}, state.plan.steps_before(since))
        shown = ", ".join(f"{dataset} {losses[dataset].nats_per_token:.4f}" for dataset in datasets)
        state.display.say(f"measured again at the start of stage {name}, {weights}: {shown}")


def _needed(state: TrainerState, stage: StagePlan, *, resumes: bool) -> dict[str, tuple[list[str], str]]:
    """The baselines to measure again: by stage, its datasets and the `init` that loads its initial weights."""
    plan, needed = state.plan, dict[str, tuple[list[str], str]]()
    begun = plan.stages.index(stage) + resumes
    for name, dataset in _baselines(plan, plan.stages.index(stage), state.validator.identities):
        _, measured_on = state.log.before.get((name, dataset), (None, None))
        since = plan.stage(name)
        if plan.stages.index(since) < begun and measured_on != state.validator.identities[dataset]:
            needed.setdefault(name, ([], _first_weights(state, since)))[0].append(dataset)
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


def _first_weights(state: TrainerState, stage: StagePlan) -> str:
    """A stage's `init`; a stage in it becomes that stage's checkpoint, of this run or of the run it branched off."""
    if not isinstance(stage.init, StageCheckpoint):
        return stage.init
    folder = checkpoint_folder(state.folder, stage.init.stage, stage.init.steps_done)
    run: Path | None = state.folder
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
            continue  # damaged; resuming from it reports that
        if isinstance(checkpoint, str):
            return Path(checkpoint).resolve().parents[1]
    return None
