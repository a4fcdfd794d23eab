"""Uploads of a run on rank 0: continue from them, start the uploading thread, log what it did, wait for it at the end.

All ranks write their shards into one run folder, on a file system that the nodes share, so rank 0 sees all files.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from titan_cpt.checkpoint.remote.keep_local import prune_uploaded
from titan_cpt.checkpoint.remote.owner import Owner
from titan_cpt.checkpoint.remote.restore import download_initial, restore_run
from titan_cpt.checkpoint.remote.uploader import Uploader
from titan_cpt.common.console import RunConsole
from titan_cpt.common.run_folder import checkpoint_folder, checkpoint_folders
from titan_cpt.common.weights.named_weights import split_average
from titan_cpt.config.schema import Config
from titan_cpt.data.inventory import take_inventory
from titan_cpt.distributed.process_group import ProcessInfo, any_rank_stops, rank_0_first
from titan_cpt.errors import os_error_message
from titan_cpt.object_storage.locations import is_url
from titan_cpt.planning.plan import StageCheckpoint
from titan_cpt.planning.planner import make_plan
from titan_cpt.training.resume import misfit
from titan_cpt.training.state import TrainerState

_SECONDS_AFTER_SIGNAL = 20.0  # Slurm kills a job about 30 s after SIGTERM
_PATIENCE_SECONDS = 180.0  # at the end of a run, without progress of the uploads


def restore_from_storage(config: Config, process: ProcessInfo, folder: Path, console: RunConsole) -> Owner | None:
    """On rank 0: download what this run needs and the local folder lacks; the other ranks wait without a timeout.

    Returns:
        The session as the owner of the run's uploads; None without uploads, or if storage does not answer.

    Raises:
        CheckpointError, RemoteError: see `restore_run` and `download_initial`.
    """
    owner = None
    with rank_0_first():
        if process.rank == 0:

            def say(text: str) -> None:
                console.print(text, highlight=False, markup=False, soft_wrap=True)

            upload = config.checkpoint.upload
            if upload is not None:
                plan = make_plan(config, take_inventory(config), process.world_size)
                starts = [
                    (each.name, (each.init.stage, each.init.steps_done))
                    if isinstance(each.init, StageCheckpoint)
                    else (each.name, None)
                    for each in plan.stages
                ]
                differs = partial(misfit, folder, plan)
                owner = restore_run(folder, f"{upload.to}/{config.job.name}", starts, misfit=differs, say=say)
            for number, stage in enumerate(config.stages):
                kind, _, url = (stage.init or "").partition(":")
                begun = any(checkpoint_folders(folder, later.name) for later in config.stages[number:])
                if kind == "checkpoint" and is_url(url) and not begun:
                    download_initial(folder, split_average(url)[0], say=say)
    return owner


def start_uploader(config: Config, folder: Path, process: ProcessInfo, owner: Owner | None) -> Uploader | None:
    """Start to upload what is not uploaded yet; None without uploads, and on ranks other than 0."""
    upload = config.checkpoint.upload
    if upload is None or process.rank != 0:
        return None
    uploader = Uploader(folder, f"{upload.to}/{config.job.name}", upload.what, owner)
    uploader.start()
    return uploader


def poll_saves(state: TrainerState) -> None:
    """Print and log which saves and uploads ended since the last call; remove local checkpoints beyond keep_local."""
    state.checkpoints.poll()
    _poll_uploads(state)


def _poll_uploads(state: TrainerState) -> None:
    upload = state.config.checkpoint.upload
    if state.uploads is None or upload is None:
        return
    messages = state.uploads.messages()
    for message in messages:
        show = state.display.warn if message.event == "upload_failed" else state.display.say
        show(message.text)
        state.log.event(message.event, **message.fields)
    if upload.keep_local is not None and any(message.event == "upload" for message in messages):
        try:
            removed = prune_uploaded(
                state.checkpoints.listed(),
                upload.keep_local,
                is_uploaded=state.uploads.is_uploaded,
                needed=_needed(state),
            )
        except OSError as error:
            state.display.warn(f"  an uploaded checkpoint cannot be removed here: {os_error_message(error)}")
        else:
            for folder in removed:
                state.display.say(f"  removed here, as it is uploaded: {folder}")


def finish_uploads(state: TrainerState, *, after_signal: bool = False) -> bool:
    """Wait for the uploads as long as there is progress, but briefly after a signal; returns whether all are done."""
    if state.config.checkpoint.upload is None:
        return True
    limit_s = _SECONDS_AFTER_SIGNAL if after_signal else None
    complete = True
    with rank_0_first():
        if state.uploads is not None:
            try:
                with state.stop.interrupting():
                    complete = state.uploads.wait(
                        patience_s=_PATIENCE_SECONDS, limit_s=limit_s, say=state.display.result
                    )
            except KeyboardInterrupt:
                complete = False
            _poll_uploads(state)
            if not complete:
                state.display.warn(
                    f"not everything is uploaded to {state.uploads.to}; it is all in {state.folder}. To finish the "
                    f"uploads: titan-cpt upload {state.folder}"
                )
    any_rank_stops(state.stop)  # rank 0 serves the store through which the others wait: it must not end before them
    return complete


def close_uploads(state: TrainerState) -> None:
    """End the uploading thread without waiting for it."""
    if state.uploads is not None:
        state.uploads.close()


def _needed(state: TrainerState) -> set[Path]:
    """Checkpoints of this run from which a stage starts that is not finished."""
    newest = next(iter(state.checkpoints.listed()), None)
    begun = 0 if newest is None else newest.manifest["stage_index"]
    return {
        checkpoint_folder(state.folder, stage.init.stage, stage.init.steps_done)
        for stage in state.plan.stages[begun:]
        if isinstance(stage.init, StageCheckpoint)
    }
