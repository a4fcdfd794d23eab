"""Save checkpoints during training, with the metadata for their manifests, and print and log each result."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from titan_cpt.checkpoint.manifest import digest_of_files
from titan_cpt.checkpoint.manifest import read as read_manifest
from titan_cpt.checkpoint.remote.uploader import Uploader
from titan_cpt.common.recipe import fingerprint
from titan_cpt.common.run_folder import PRE_ANNEAL
from titan_cpt.distributed.process_group import ProcessInfo
from titan_cpt.errors import CheckpointError
from titan_cpt.models.common.ops import CPU_HAS_BFLOAT16
from titan_cpt.planning.plan import StagePlan
from titan_cpt.training.metrics import MetricsLog
from titan_cpt.training.screen.display import Display
from titan_cpt.training.state import TrainerState

SLOW_SAVE_S = 10.0  # print a hint if training waited longer than this for the previous save


def save_checkpoint(
    state: TrainerState, stage: StagePlan, steps_done: int, kind: str, *, validation_due: bool = False
) -> None:
    """Start saving a checkpoint of the current state; it is valid once its manifest is written.

    Args:
        kind: "interval", "stage_end" or "pre_anneal".
        validation_due: a signal interrupted validation, which is repeated first on resume.
    """
    metadata = {**checkpoint_metadata(state, stage, steps_done, kind), "validation_due": validation_due}
    with state.display.timed("checkpoints"):
        copies, about_copies = state.copies.to_save(kind, steps_done)
        state.checkpoints.save(
            state.model,
            state.optimizer,
            stage=stage.name,
            steps_done=steps_done,
            record={**metadata, **about_copies},
            copies=copies,
        )
    if state.checkpoints.waited_s > SLOW_SAVE_S:
        state.display.warn(
            f"  training waited {state.checkpoints.waited_s:.0f} s for the previous checkpoint to be written; "
            "a longer checkpoint.interval or a faster disk would avoid that"
        )
    if kind == PRE_ANNEAL:
        state.log.event("anneal", stage=stage.name, step=steps_done)
        state.display.say(
            f"  annealing begins; the checkpoint at step {steps_done:,} of {stage.name} is kept for other anneals",
            wrap=True,
        )
    state.log.restart_clock()


def checkpoint_metadata(state: TrainerState, stage: StagePlan, steps_done: int, kind: str) -> dict[str, Any]:
    """Metadata for a checkpoint's manifest: step, recipe, data fingerprints, skipped batches, hardware."""
    plan = state.plan
    index = plan.stages.index(stage)
    recipe = plan.recipe_until(index)
    return {
        "stage_index": index,
        "kind": kind,
        "run_step": plan.steps_before(stage) + steps_done,
        "recipe": recipe,
        "fingerprint": fingerprint(recipe),
        "data": state.identities,
        "skipped": state.skipped.skipped_before([earlier.name for earlier in plan.stages[: index + 1]], steps_done),
        "recent_losses": state.guard.recent_losses(),
        **({"rope": stage.spec.rope.as_record()} if stage.spec.rope != plan.spec.rope else {}),
        **state.attention.measured,
        "python": platform.python_version(),
        **machine(state.process),
    }


def machine(process: ProcessInfo) -> dict[str, Any]:
    """Properties of the machine that can change the last bits of a sum: ranks, threads, device, vector instructions."""
    if process.device.type == "cuda":
        processor = torch.cuda.get_device_name(process.device)
    else:
        processor = torch.backends.cpu.get_cpu_capability() + (" with bfloat16" if CPU_HAS_BFLOAT16 else "")
    return {
        "world_size": process.world_size,
        "threads": torch.get_num_threads(),
        "device": process.device.type,
        "processor": processor,
    }


def log_saved(log: MetricsLog, display: Display, uploads: Uploader | None, folder: Path) -> None:
    """Print and log a checkpoint that is now valid, with the digest of its files, which identifies it in scores."""
    saved = read_manifest(folder)
    log.event(
        "checkpoint",
        folder=str(folder),
        stage=saved["stage"],
        step=saved["steps_done"],
        files=digest_of_files(saved),
    )
    display.say(f"  checkpoint: {folder}")
    if uploads is not None:
        uploads.notify()


def log_save_failed(log: MetricsLog, display: Display, error: CheckpointError) -> None:
    """Print and log that a checkpoint could not be written."""
    display.warn(f"  {error}")
    log.event("save_failed", why=str(error))
