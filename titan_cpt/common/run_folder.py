"""What guards a run from outside: one process at a time in its folder, and signals that ask it to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from titan_cpt.common.file_lock import exclusive
from titan_cpt.errors import CheckpointError

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


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


class StopRequest:
    """Turns SIGTERM, SIGUSR1 and the first SIGINT into a request that the training loop honours between two steps.

    SIGUSR1 is what Slurm is told to send before a time limit. A second SIGINT ends the process at once: checkpoints
    count only with their manifest, so that nothing is harmed.
    """

    def __init__(self) -> None:
        self.name = ""
        self._interrupting = False

    def __enter__(self) -> StopRequest:
        """Listen from here on."""
        self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within the block a signal raises KeyboardInterrupt at once: for work that has no steps to stop between."""
        self._interrupting = True
        try:
            yield
        finally:
            self._interrupting = False

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; collective, the same answer on every rank."""
        if not dist.is_initialized():
            return bool(self.name)
        asked = torch.tensor(int(bool(self.name)))
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        stop = bool(asked.item())  # and not the name, which a signal may have set since: the others do not know of it
        if stop and not self.name:
            self.name = "a signal to another rank"
        return stop

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.name = signal.Signals(number).name
        if self._interrupting:
            raise KeyboardInterrupt
