"""Begin a stage from its `init` (random weights, an earlier stage, a checkpoint, a released model), or resume it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint.averages import require_same_averaging, require_weights
from titan_cpt.checkpoint.checkpoint_spec import (
    model_differences,
    model_recipe,
    remedies_of,
    rope_change,
    rope_of_checkpoint,
    spec_of_checkpoint,
)
from titan_cpt.checkpoint.hf_import import load_released
from titan_cpt.checkpoint.manager import FoundCheckpoint
from titan_cpt.checkpoint.manifest import has_optimizer_state, no_state_to_keep
from titan_cpt.checkpoint.manifest import read as read_manifest
from titan_cpt.checkpoint.remote.restore import downloaded_initial
from titan_cpt.checkpoint.state_dict import load_state
from titan_cpt.checkpoint.tokenizer_check import require_same_tokenizer, tokenizer_of_manifest, tokenizer_of_release
from titan_cpt.checkpoint.vocabulary.model_rows import write_rows
from titan_cpt.checkpoint.vocabulary.new_rows import NewRows, load_vocabulary, read_checkpoint, require_old_rows
from titan_cpt.common.reading import is_there
from titan_cpt.common.run_folder import MANIFEST_FILE, checkpoint_folder
from titan_cpt.common.weights.named_weights import NamedWeights, named_weights, split_average, suffix_of
from titan_cpt.common.weights.partition import partition_of_recipe
from titan_cpt.common.weights.patterns import short_list
from titan_cpt.distributed.float8 import refresh_scales
from titan_cpt.distributed.process_group import raise_on_all_ranks
from titan_cpt.errors import CheckpointError
from titan_cpt.models.huggingface_weights import VOCABULARY_WEIGHTS
from titan_cpt.models.spec import Rope
from titan_cpt.object_storage.locations import is_url
from titan_cpt.planning.plan import StageCheckpoint, StagePlan
from titan_cpt.planning.stages.partition import weight_sizes, weights_with_new_state
from titan_cpt.training.optimization.adamw import reset_state, set_hyperparameters
from titan_cpt.training.optimization.update import set_lr
from titan_cpt.training.state import TrainerState
from titan_cpt.training.weights.initial_rows import InitialRows, RowFindings
from titan_cpt.training.weights.new_rows import new_rows_at_start

_AVERAGING = "init.averaging."  # keys of the recipe of a stage that starts from the average of a stage of its run


def begin_stage(state: TrainerState, stage: StagePlan) -> int:
    """Begin a stage: load its initial weights, reset or keep the optimizer, apply its hyperparameters.

    Returns:
        The steps done: 0; or minus the number of passes at LR 0 that must warm up the optimizer state before.

    Raises:
        CheckpointError: the initial weights are missing or damaged, or belong to another model.
    """
    state.checkpoints.wait()
    state.trained.use(stage)
    weights, rows = _load(state, stage, InitialRows(state, stage))
    state.copies.begin(stage)
    if not stage.keep_optimizer:
        reset_state(state.optimizer)
    _apply_stage_hyperparameters(state, stage)
    state.guard.restore_losses(_losses_before(state, stage))
    first = state.plan.schedule_span(stage)[0]
    continued = "" if first is stage else f", in the schedule of {first.name}"
    start = {
        "weights": weights,
        **({"rows": "; ".join(rows.lines)} if rows.lines else {}),
        "optimizer": _optimizer_text(stage),
        "lr": f"{stage.lr_at(0):.4g} at the first step{continued}",
        **({} if stage.partition is None else {"trains": stage.partition.description}),
    }
    history = stage.history
    earlier = {
        "data": {source: history.next_ordinal(source, stage.seq_len) for source in sorted(history.trained)},
        "replay": {source: -(-tokens // stage.seq_len) for source, tokens in sorted(history.replayed.items())},
    }
    state.log.event("transition", stage=stage.name, step=0, **start, **earlier, **rows.counts)
    state.log.rewind(state.plan.steps_before(stage))
    state.display.transition(stage, start)
    return -stage.warm_up_passes


def _optimizer_text(stage: StagePlan) -> str:
    if stage.warm_up_passes:
        return f"reset, then warmed up by {stage.warm_up_passes:,} passes at LR 0"
    return "moments and step count kept" if stage.keep_optimizer else "reset"


def _losses_before(state: TrainerState, stage: StagePlan) -> Sequence[float]:
    """The losses before the stage with which its first losses are compared: none, unless it continues a schedule."""
    if not stage.schedule_offset:
        return ()
    assert isinstance(stage.init, StageCheckpoint), "a stage that continues a schedule follows another"
    record = read_manifest(checkpoint_folder(state.folder, stage.init.stage, stage.init.steps_done))
    losses: Sequence[float] = record.get("recent_losses", ())
    return losses


def resume_stage(state: TrainerState, checkpoint: FoundCheckpoint) -> int:
    """Resume a stage from a checkpoint; returns the number of steps done."""
    stage = state.plan.stage(checkpoint.manifest["stage"])
    steps_done = int(checkpoint.manifest["steps_done"])
    state.trained.use(stage)
    load_state(checkpoint.folder, state.model, state.optimizer)
    set_rope(state, stage.spec.rope)
    _apply_stage_hyperparameters(state, stage)
    state.skipped.restore(checkpoint.manifest.get("skipped"))
    state.guard.restore_losses(checkpoint.manifest.get("recent_losses", ()))
    changed = state.copies.resume(stage, checkpoint.folder, checkpoint.manifest)
    state.log.event("resume", stage=stage.name, step=steps_done, folder=str(checkpoint.folder))
    state.log.rewind(state.plan.steps_before(stage) + steps_done)
    state.display.say(
        f"stage {stage.name}: resumes after step {steps_done:,} of {stage.steps:,}, from {checkpoint.folder}"
    )
    if changed is not None:
        state.display.warn(f"  {changed}")
    return steps_done


def _apply_stage_hyperparameters(state: TrainerState, stage: StagePlan) -> None:
    """Set the stage's attention kernel and hyperparameters, after loading: a loaded state brings its own."""
    state.attention.use(stage.name, state.runner.models)
    if state.config.float8.enable_fsdp_float8_all_gather:
        refresh_scales(state.model)
    given = stage.optimizer
    set_hyperparameters(state.optimizer, betas=given.betas, eps=given.eps, weight_decay=given.weight_decay)
    set_lr(state.optimizer, stage.lr_at(0))


def load_initial(state: TrainerState, stage: StagePlan) -> str:
    """Load a stage's initial weights, and the optimizer state if it is kept; returns a description of the source.

    The model computes with the stage's RoPE from then on.

    Raises:
        CheckpointError: the source of `init` is missing or damaged, or is another model.
    """
    return _load(state, stage, InitialRows(state, stage, quiet=True))[0]


def _load(state: TrainerState, stage: StagePlan, rows: InitialRows) -> tuple[str, RowFindings]:
    set_rope(state, stage.spec.rope)
    if stage.init == "random":
        state.model.init_weights(state.plan.seed)
        return f"new, from seed {state.plan.seed}", rows.findings
    if isinstance(stage.init, str) and stage.init.startswith("hf:"):
        name = stage.init.removeprefix("hf:")
        text = load_released(
            state.model,
            name,
            stage.spec,
            new_rope=_new_rope(stage),
            accept=partial(_accept, state, stage),
            examine=rows.of_release,
            new_rows=lambda folder: new_rows_at_start(state, stage, tokenizer_of_release(folder)),
        )
        return f"from {text}", rows.findings
    source, notes, new = _source(state, stage)
    changes = rows.of_checkpoint(source)
    if new is not None:
        load_state(source.folder, state.model, None, average=source.average, without=VOCABULARY_WEIGHTS)
        with raise_on_all_ranks():  # each rank reads the rows of its own shard
            load_vocabulary(state.model, read_checkpoint(source), new, changes)
        made = new.describe(stage.spec.vocab_size, tied=stage.spec.tied)
        return "; ".join([f"from {source}", made, *notes]), rows.findings
    anew: list[str] = []
    optimizer = None
    if stage.keep_optimizer:
        optimizer = state.optimizer
        reset_state(optimizer)
        record = read_manifest(source.folder)
        earlier = partition_of_recipe(record["recipe"], record["stage"], weight_sizes(stage.spec))
        anew = weights_with_new_state(stage, earlier)
    load_state(source.folder, state.model, optimizer, average=source.average, without_state=anew)
    write_rows(state.model, changes)
    if anew:
        notes.append(f"the optimizer state of {short_list(anew)} begins anew: other rows were trained")
    return "; ".join([f"from {source}", *notes]), rows.findings


def require_saved_averages(run: Path, stages: Sequence[StagePlan]) -> None:
    """Check the checkpoints of a run from whose average one of these stages starts, as far as they are saved.

    Raises:
        CheckpointError: one of them holds none, or one of other settings: [averaging] is newer than the checkpoint.
    """
    for stage in stages:
        if isinstance(stage.init, StageCheckpoint) and stage.init.average:
            weights = NamedWeights(checkpoint_folder(run, stage.init.stage, stage.init.steps_done), average=True)
            if is_there(weights.folder / MANIFEST_FILE):
                _require_planned(weights, read_manifest(weights.folder), stage)


def _require_planned(weights: NamedWeights, record: Mapping[str, Any], stage: StagePlan) -> None:
    """Check that a checkpoint holds the weights that a stage starts from; an average of this run as it is planned."""
    require_weights(weights, record)
    if weights.average:
        planned = {
            key.removeprefix(_AVERAGING): value for key, value in stage.recipe.items() if key.startswith(_AVERAGING)
        }
        require_same_averaging(weights.folder, record, planned)


def _accept(state: TrainerState, stage: StagePlan, folder: Path) -> str | None:
    """Check that a released model's tokenizer is the run's; a note if it is unknown or a mismatch is allowed."""
    return require_same_tokenizer(stage.name, str(stage.init), tokenizer_of_release(folder), state.config)


def _source(state: TrainerState, stage: StagePlan) -> tuple[NamedWeights, list[str], NewRows | None]:
    """The weights that `init` names, in a verified checkpoint, notes on its tokenizer and RoPE, and new rows.

    Raises:
        CheckpointError: it is damaged, of another model or tokenizer, or lacks the average, or the optimizer state that
            is to be kept.
    """
    weights = _named(state, stage)
    folder = weights.folder
    record = state.checkpoints.verify(folder)
    _require_planned(weights, record, stage)
    if stage.keep_optimizer and not has_optimizer_state(record):
        raise CheckpointError(no_state_to_keep(record, of=str(folder), stage=stage.name))
    tokenizer = tokenizer_of_manifest(record, folder)
    new = new_rows_at_start(state, stage, tokenizer)
    planned = stage.spec.as_recipe()
    if new is not None:
        rows = spec_of_checkpoint(record, folder).vocab_size
        require_old_rows(str(folder), rows, new)
        if rows < stage.spec.vocab_size:
            planned["model.vocab_size"] = rows
    changed = model_differences(model_recipe(record), planned, _new_rope(stage))
    if changed:
        raise CheckpointError(
            "\n  ".join([f"{folder}: its model differs from the config's: {'; '.join(changed)}", *remedies_of(changed)])
        )
    init = stage.init if isinstance(stage.init, str) else f"stage:{stage.init.stage}{suffix_of(weights.average)}"
    note = require_same_tokenizer(stage.name, init, tokenizer, state.config)
    return weights, [*filter(None, [note, rope_change(rope_of_checkpoint(record), stage.spec.rope)])], new


def _named(state: TrainerState, stage: StagePlan) -> NamedWeights:
    """The weights in a local folder that an `init` of a checkpoint names."""
    if isinstance(stage.init, StageCheckpoint):
        folder = checkpoint_folder(state.folder, stage.init.stage, stage.init.steps_done)
        return NamedWeights(folder, stage.init.average)
    name = stage.init.removeprefix("checkpoint:")
    if not is_url(name):
        return named_weights(name)
    url, average = split_average(name)
    return NamedWeights(downloaded_initial(state.folder, url), average)


def _new_rope(stage: StagePlan) -> list[str]:
    """Keys of the model's recipe that the stage sets, whatever the initial weights were trained with."""
    sets = {"model.rope_base": "rope.base", "model.rope_scaling": "rope.kind"}
    return [key for key, own in sets.items() if own in stage.recipe]


def set_rope(state: TrainerState, rope: Rope) -> None:
    """Compute with this RoPE from now on, in the module of the weights and in those that run."""
    for model in (state.model, *state.runner.models):
        model.set_rope(rope)
