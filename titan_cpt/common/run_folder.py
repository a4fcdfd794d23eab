"""The folder of a run: names of its files and folders, its checkpoints, and the lock of the process that trains.

<job.output_dir>/<job.name>/
    config.toml                   resolved config of the last start
    plan.json                     the training plan
    metrics.jsonl                 losses, learning rates, throughput and events, one JSON object per line
    summary.json                  losses and forgetting of every trained stage
    uploads.json                  checkpoints whose upload to object storage has been verified
    .lock                         held by the process that trains
    STAGE/step-00000500/          a checkpoint; it is valid only once its manifest.json is written
    STAGE/skipped.json            batches of the stage that training skips
    evaluations/STAGE/step-.../   benchmark scores, and the texts that the example prompts gave (generations.json)
    profile/STAGE-step-.../       traces of torch.profiler, one for each rank
    tb/                           TensorBoard events over steps, and below over_tokens/ over tokens
    report/                       the HTML report
    trackers/                     position, lock and log of each experiment tracker; offline files of Weights & Biases
    logs/rank-0.log               what rank 0 printed, its warnings and errors, of all sessions; a file for each rank
    logs/ATTEMPT/                 all output of each process, written by run_train.sh for several processes and Slurm
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from titan_cpt.common.file_lock import exclusive
from titan_cpt.common.reading import matching
from titan_cpt.errors import CheckpointError

CONFIG_FILE = "config.toml"
SWEEP_CONFIG_FILE = "arm.toml"  # of a sweep run: the config to train with; config.toml is that of the last start
PLAN_FILE = "plan.json"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
UPLOADS_FILE = "uploads.json"
LOCK_FILE = ".lock"
MANIFEST_FILE = "manifest.json"  # in a checkpoint
SKIPPED_FILE = "skipped.json"  # in a stage's folder
GENERATIONS_FILE = "generations.json"  # beside a checkpoint's scores

EVALUATIONS_FOLDER = "evaluations"
PROFILE_FOLDER = "profile"
TENSORBOARD_FOLDER = "tb"
TOKENS_FOLDER = "over_tokens"  # in it: curves whose x axis is tokens
REPORT_FOLDER = "report"
TRACKERS_FOLDER = "trackers"  # has no name that a stage's folder has, so a stage may be called trackers
LOGS_FOLDER = "logs"
RESERVED_STAGE_NAMES = (TENSORBOARD_FOLDER, EVALUATIONS_FOLDER, PROFILE_FOLDER, REPORT_FOLDER, LOGS_FOLDER)

INTERVAL = "interval"  # kinds of checkpoint: every checkpoint.interval steps,
STAGE_END = "stage_end"  # at the end of a stage,
PRE_ANNEAL = "pre_anneal"  # and on the last step before a schedule anneals

_locked_here: set[tuple[int, str]] = set()
"""(process id, run folder) of the locks that this process holds: the kernel's are between processes only."""


def step_name(steps_done: int) -> str:
    """The name of a checkpoint's folder after `steps_done` steps of its stage, such as step-00000500."""
    return f"step-{steps_done:08d}"


def log_path(run: Path, rank: int) -> Path:
    """The log file of a rank."""
    return run / LOGS_FOLDER / f"rank-{rank}.log"


def checkpoint_folder(run: Path, stage: str, steps_done: int) -> Path:
    """The folder of the checkpoint of a stage after `steps_done` of its steps."""
    return run / stage / step_name(steps_done)


def checkpoint_folders(run: Path, stage: str = "*") -> list[Path]:
    """Folders of a run's checkpoints that have a manifest, sorted by path; those of one stage if it is given.

    Raises:
        AccessError: a folder cannot be read.
    """
    return [path.parent for path in matching(run, stage, "step-*", MANIFEST_FILE)]


@contextmanager
def locked(folder: Path, *, rank: int) -> Iterator[None]:
    """Hold the lock of a run's folder on rank 0, and create the folder if it is missing.

    The kernel releases the lock however the process ends.

    Raises:
        CheckpointError: another process, or this one, holds the lock, or the folder cannot be created.
        AccessError: the lock cannot be taken for another reason.
    """
    if rank != 0:
        yield
        return

    def held(by: str) -> CheckpointError:
        return CheckpointError(
            f"{folder}: another process is training here{by}. Wait for it, or choose another job.name"
        )

    if (os.getpid(), os.path.realpath(folder)) in _locked_here:
        raise CheckpointError(f"{folder}: this process is training here already. Close that Trainer first")
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive(folder / LOCK_FILE, held=held))
        except OSError as error:
            if isinstance(error, FileExistsError | NotADirectoryError):
                raise CheckpointError(
                    f"{folder}: cannot be written: a file has the name of the folder. Choose another job.name or "
                    "job.output_dir, or rename the file"
                ) from None
            raise CheckpointError(
                f"{folder}: cannot be written: {error.strerror}. Choose another job.output_dir, or change the "
                "folder's permissions"
            ) from None
        mine = os.getpid(), os.path.realpath(folder)  # resolve() raises for a loop of links
        _locked_here.add(mine)
        stack.callback(_locked_here.discard, mine)
        yield
