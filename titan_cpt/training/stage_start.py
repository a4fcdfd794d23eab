"""How a stage starts: from its `init` (new weights, an earlier stage, a checkpoint, a released model), or resumed."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from titan_cpt.checkpoint.hf_import import IMPORTED, load_released
from titan_cpt.checkpoint.manager import FoundCheckpoint
from titan_cpt.checkpoint.state_dict import load_state
from titan_cpt.checkpoint.tokenizer_check import require_same_tokenizer, tokenizer_of_manifest, tokenizer_of_release
from titan_cpt.common.recipe import differences
from titan_cpt.common.run_folder import checkpoint_folder
from titan_cpt.distributed.float8 import refresh_scales
from titan_cpt.errors import CheckpointError
from titan_cpt.planning.plan import StageCheckpoint, StagePlan
from titan_cpt.training.optimizer import reset_state, set_hyperparameters, set_lr
from titan_cpt.training.state import TrainerState


def begin_stage(state: TrainerState, stage: StagePlan) -> int:
    """Begin a stage: load its initial weights, reset or keep the optimizer, apply its hyperparameters.

    Returns:
        The steps done, 0.

    Raises:
        CheckpointError: the initial weights are missing or damaged, or belong to another model.
    """
    state.checkpoints.wait()
    weights = load_initial(state, stage)
    if not stage.keep_optimizer:
        reset_state(state.optimizer)
    _apply_stage_hyperparameters(state, stage)
    state.guard.recall(())
    start = {
        "weights": weights,
        "optimizer": "moments and step count kept" if stage.keep_optimizer else "reset",
        "lr": f"{stage.lr_at(0):.4g} at the first step",
    }
    used = {"data": dict(sorted(stage.history.trained.items())), "replay": dict(sorted(stage.history.replayed.items()))}
    state.log.event("transition", stage=stage.name, step=0, **start, **used)
    state.log.rewind(state.plan.steps_before(stage))
    state.display.transition(stage, start)
    return 0


def resume_stage(state: TrainerState, found: FoundCheckpoint) -> int:
    """Resume a stage from a checkpoint; returns the number of steps done."""
    stage = state.plan.stage(found.manifest["stage"])
    steps_done = int(found.manifest["steps_done"])
    load_state(found.folder, state.model, state.optimizer)
    _apply_stage_hyperparameters(state, stage)
    state.skipped.recall(found.manifest.get("skipped"))
    state.guard.recall(found.manifest.get("recent_losses", ()))
    state.log.event("resume", stage=stage.name, step=steps_done, folder=str(found.folder))
    state.log.rewind(state.plan.steps_before(stage) + steps_done)
    state.display.say(f"stage {stage.name}: resumes after step {steps_done:,} of {stage.steps:,}, from {found.folder}")
    return steps_done


def _apply_stage_hyperparameters(state: TrainerState, stage: StagePlan) -> None:
    """Set the stage's optimizer hyperparameters. After any state was loaded: it brings those of its own stage."""
    if state.config.float8.enable_fsdp_float8_all_gather:
        refresh_scales(state.model)
    adamw = stage.optimizer
    set_hyperparameters(state.optimizer, betas=adamw.betas, eps=adamw.eps, weight_decay=adamw.weight_decay)
    set_lr(state.optimizer, stage.lr_at(0))


def load_initial(state: TrainerState, stage: StagePlan) -> str:
    """Load a stage's initial weights, and the optimizer state if it is kept; returns a description of the source.

    Raises:
        CheckpointError: the source of `init` is missing or damaged, or is another model.
    """
    if stage.init == "random":
        state.model.init_weights(state.plan.seed)
        return f"new, from seed {state.plan.seed}"
    if isinstance(stage.init, str) and stage.init.startswith("hf:"):
        name = stage.init.removeprefix("hf:")
        accept = partial(_accept, state, stage)
        return f"from {load_released(state.model, name, state.plan.spec, accept=accept)}"
    source, note = _source(state, stage)
    load_state(source, state.model, state.optimizer if stage.keep_optimizer else None)
    return f"from {source}" if note is None else f"from {source}; {note}"


def _accept(state: TrainerState, stage: StagePlan, folder: Path) -> str | None:
    """A note on a released model's tokenizer; refuses one that differs from the run's."""
    return require_same_tokenizer(stage.name, str(stage.init), tokenizer_of_release(folder), state.config)


def _source(state: TrainerState, stage: StagePlan) -> tuple[Path, str | None]:
    """The verified checkpoint that `init` names, and a note on its tokenizer."""
    if isinstance(stage.init, StageCheckpoint):
        folder = checkpoint_folder(state.folder, stage.init.stage, stage.init.steps_done)
    else:
        folder = Path(stage.init.removeprefix("checkpoint:"))
    found, ours = state.checkpoints.verify(folder), state.plan.base_recipe
    if stage.keep_optimizer and found["kind"] == IMPORTED:
        raise CheckpointError(
            f"{folder}: is an import, which has no optimizer state to keep: set stages.{stage.name}.optimizer_state to "
            "reset"
        )
    there = found["recipe"]
    shape = {key for key in {*ours, *there} if key.startswith("model.")}
    changed = differences({k: there.get(k) for k in shape}, {k: ours.get(k) for k in shape})
    if changed:
        raise CheckpointError(f"{folder}: holds another model than the config's: {'; '.join(changed)}")
    init = stage.init if isinstance(stage.init, str) else f"stage:{stage.init.stage}"
    return folder, require_same_tokenizer(stage.name, init, tokenizer_of_manifest(found, folder), state.config)
