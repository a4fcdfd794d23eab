"""What guards a run from outside: one process at a time in its folder, and signals that ask it to stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from titan_cpt.common.file_lock import exclusive
from titan_cpt.errors import CheckpointError

CONFIG_NAME = "config.toml"
EVALUATIONS_FOLDER = "evaluations"  # benchmark scores: <stage>/step-<8 digits>/<task>.json
GENERATIONS_NAME = "generations.json"  # beside them: continuations of the example prompts


INTERVAL = "interval"  # kinds of checkpoint: every checkpoint.interval steps,
STAGE_END = "stage_end"  # at the end of a stage,
PRE_ANNEAL = "pre_anneal"  # and on the last step before a schedule anneals


@contextmanager
def locked(folder: Path, *, rank: int) -> Iterator[None]:
    """Hold the run's folder, which is made if need be; the kernel lets go of it however the process ends.

    Raises:
        CheckpointError: another process holds it, or it cannot be created.
        AccessError: the lock cannot be taken for another reason than that.
    """
    if rank != 0:
        yield
        return

    def held(by: str) -> CheckpointError:
        return CheckpointError(
            f"{folder}: another process is training here{by}. Wait for it, or choose another job.name"
        )

    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive(folder / ".lock", held=held))
        except OSError as error:
            raise CheckpointError(
                f"{folder}: cannot be written: {error.strerror}. Choose another job.output_dir, or change the "
                "folder's permissions"
            ) from None
        yield


def checkpoint_folder(run: Path, stage: str, steps_done: int) -> Path:
    """Where the checkpoint of a stage after so many steps lies."""
    return run / stage / f"step-{steps_done:08d}"
