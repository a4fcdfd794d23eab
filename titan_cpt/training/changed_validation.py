"""Measures the baselines of forgetting again if the validation data, its windows or the tokenizer changed.

Such a change between two sessions alters no weight, so the run may resume; but it never subtracts losses on different
data from each other. The weights of a baseline still exist, in the checkpoint that the stage started from: before
training resumes, they are loaded and validated on the new data. If that checkpoint was removed, forgetting is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from titan_cpt.checkpoint import manifest
from titan_cpt.common.run_folder import MANIFEST_FILE, checkpoint_folder, checkpoint_folders
from titan_cpt.common.weights.named_weights import suffix_of
from titan_cpt.distributed.float8 import refresh_scales
from titan_cpt.distributed.process_group import any_rank_stops
from titan_cpt.errors import TitanError
from titan_cpt.planning.plan import Plan, StageCheckpoint, StagePlan
from titan_cpt.training.forgetting import validation_line
from titan_cpt.training.stage_start import load_initial
from titan_cpt.training.state import TrainerState

_BRANCHES_FOLLOWED = 50  # a longer chain of runs that branched off each other is a cycle


def note_changed_validation(state: TrainerState, stage: StagePlan, steps_done: int) -> None:
    """Log and print which validation sets changed since the last session; the TensorBoard curves get a mark.

    Args:
        stage: the stage in which training resumes, after `steps_done` of its steps.
    """
    changed = changed_datasets(state.log.last_start, state.identities, state.validator.identities)
    changed = sorted({*changed, *_other_windows(state)})
    if changed:
        state.log.event("validation_changed", stage=stage.name, step=steps_done, datasets=changed)
        state.display.warn(
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
        identities: identities of this session's validation sets.
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
    """Datasets whose number of windows differs from the last session's, if an older version ran that session."""
    last_start = state.log.last_start
    validator = state.validator
    last_sequences = last_start.get("validation_sequences")
    if last_sequences is None:
        return []
    measured = [name for name in validator.streams if f"datasets.{name}.validation" in last_start.get("data", {})]
    available = {name: validator.streams[name].windows(validator.windows.seq_len) for name in measured}
    return [
        name for name, windows in available.items() if min(windows, last_sequences) != min(windows, validator.sequences)
    ]


def renew_baselines(state: TrainerState, stage: StagePlan, *, resumes: bool) -> None:
    """Measure every baseline again that was measured on other data and that later validations need; collective.

    This loads weights of earlier stages into the model: call it before loading those to train.

    Args:
        stage: the stage that is trained next.
        resumes: the stage resumes from one of its checkpoints.
    """
    needed: list[Any] = [_needed(state, stage, resumes=resumes)]
    if dist.is_initialized():
        dist.broadcast_object_list(needed, src=0, group=state.checkpoints.group)
    for name, (datasets, init) in needed[0].items():
        baseline_stage = state.plan.stage(name)
        try:
            weights = load_initial(state, replace(baseline_stage, init=init, keep_optimizer=False))
        except TitanError as error:
            state.display.warn(
                f"forgetting of {', '.join(datasets)} is unknown from here on: its loss at the start of stage {name} "
                "was measured on other validation data, and these weights cannot be loaded to measure it again: "
                f"{error}"
            )
            continue
        if state.config.float8.enable_fsdp_float8_all_gather:
            refresh_scales(state.model)
        losses = state.validator.measure(state.runner, name, interrupted=partial(any_rank_stops, state.stop))
        if losses is None:
            return  # a signal interrupted it: the next session measures these baselines
        for dataset, loss in losses.items():
            line = validation_line(state, baseline_stage, 0, dataset, loss)
            state.log.validation({**line, "measured_again": True}, state.plan.steps_before(baseline_stage))
        shown = ", ".join(f"{dataset} {losses[dataset].nats_per_token:.4f}" for dataset in datasets)
        state.display.warn(f"measured again at the start of stage {name}, {weights}: {shown}")


def _needed(state: TrainerState, stage: StagePlan, *, resumes: bool) -> dict[str, tuple[list[str], str]]:
    """The baselines to measure again: by stage, its datasets and the `init` that loads its initial weights."""
    plan = state.plan
    next_stage = plan.stages.index(stage)
    stages_begun = next_stage + 1 if resumes else next_stage
    needed: dict[str, tuple[list[str], str]] = {}
    labels = {each.name: state.validator.labels(each.name) for each in plan.stages}
    for name, dataset in _baselines(plan, next_stage, labels):
        _, measured_on = state.log.baselines.get((name, dataset), (None, None))
        baseline_stage = plan.stage(name)
        if plan.stages.index(baseline_stage) < stages_begun and measured_on != state.validator.identities[dataset]:
            needed.setdefault(name, ([], _first_weights(state, baseline_stage)))[0].append(dataset)
    return needed


def _baselines(plan: Plan, first: int, labels: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """(stage, label) of every baseline that validations from stage `first` on are compared with, each once.

    Args:
        labels: what each stage measures; a loss has no baseline if that stage does not measure it.
    """
    baselines = (
        (since, label)
        for stage in plan.stages[first:]
        for label in labels[stage.name]
        if (since := plan.forgetting_since(stage, label)) is not None and label in labels[since]
    )
    return list(dict.fromkeys(baselines))


def _first_weights(state: TrainerState, stage: StagePlan) -> str:
    """A stage's `init`; an earlier stage is replaced with the path of its checkpoint, in this run or a parent run."""
    if not isinstance(stage.init, StageCheckpoint):
        return stage.init
    folder = checkpoint_folder(state.folder, stage.init.stage, stage.init.steps_done)
    suffix = suffix_of(stage.init.average)
    run: Path | None = state.folder
    for _ in range(_BRANCHES_FOLLOWED):
        if run is None:
            break
        folder_in_run = checkpoint_folder(run, stage.init.stage, stage.init.steps_done)
        if (folder_in_run / MANIFEST_FILE).exists():
            return f"checkpoint:{folder_in_run}{suffix}"
        run = _branched_from(run)
    return f"checkpoint:{folder}{suffix}"


def _branched_from(run: Path) -> Path | None:
    """The folder of the run that a run branched off; None if it did not branch."""
    for folder in checkpoint_folders(run):
        try:
            checkpoint = manifest.read(folder).get("branched_from")
        except TitanError:
            continue  # damaged; resuming from it reports that
        if isinstance(checkpoint, str):
            return Path(checkpoint).resolve().parents[1]
    return None
