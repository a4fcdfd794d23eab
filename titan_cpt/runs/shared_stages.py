"""Stages that several sweep runs share: the first run that needs them trains them, the others link its checkpoints.

Two runs share their first stages if the recipe up to there, the training data, the validation data and every setting
that can change a rounding or skip a batch are equal. A run with linked stages has the same result, bit for bit, as if
it had trained them itself.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint import manifest
from titan_cpt.common.file_lock import FileLock
from titan_cpt.common.files import write_text_atomically
from titan_cpt.common.reading import is_there, matching
from titan_cpt.common.recipe import differences, fingerprint
from titan_cpt.common.run_folder import MANIFEST_FILE, PLAN_FILE, PRE_ANNEAL, STAGE_END, checkpoint_folders, locked
from titan_cpt.data.mixture import leaves
from titan_cpt.errors import AccessError
from titan_cpt.planning.plan import Plan, StagePlan
from titan_cpt.planning.plan_json import plan_as_json
from titan_cpt.runs.inherited_metrics import copy_metrics
from titan_cpt.runs.sweep_runs import SweepRun, has_checkpoint
from titan_cpt.runs.training_process import POLL_S, StopRequested, StopSignals

_LINKED_KINDS = (STAGE_END, PRE_ANNEAL)
_NUMERIC_TABLES = ("training", "parallelism", "activation_checkpoint", "compile", "float8")
_NON_NUMERIC_KEYS = {"num_workers", "gc_freq"}  # keys of [training] that change no number
_VALIDATION_KEYS = {"validation", "validation_format"}


def count_shared_stages(run: SweepRun, others: Sequence[SweepRun]) -> int:
    """The number of first stages that the run shares with at least one other run."""
    return max((_equal_stages(run, other) for other in others if other.folder != run.folder), default=0)


def adopt_shared_stages(run: SweepRun, others: Sequence[SweepRun]) -> str:
    """Link the checkpoints of the longest sequence of shared stages that another run has trained into the run's folder.

    Returns a message that names the stages, or "" if the run has checkpoints already or no other run has trained any.

    Raises:
        CheckpointError: the checkpoint to link is damaged.
    """
    if checkpoint_folders(run.folder):
        return ""
    donor, count = _longest_trained(run, others)
    if donor is None:
        return ""
    names = [stage.name for stage in run.plan.stages[:count]]
    with locked(run.folder, rank=0):
        write_text_atomically(run.folder / PLAN_FILE, json.dumps(plan_as_json(run.plan), indent=1))
        copy_metrics(
            donor.folder,
            run.folder,
            stages=[stage.name for stage in donor.plan.stages],
            until=dict.fromkeys(names),
            event={"name": "adopt", "stages": names, "folder": str(donor.folder)},
        )
        for index in range(count):  # the last stage's end is linked last: an interrupted call is repeated as a whole
            for folder in _linked_checkpoints(donor, run.plan, index):
                record = manifest.verify(folder)
                manifest.link_checkpoint(folder, run.folder / record["stage"] / folder.name, record)
    return f"{', '.join(names)} from {donor.folder} (recipe {fingerprint(run.plan.recipe_until(count - 1))})"


class SharedStageLock:
    """A lock that lets one sweep run at a time train the stages that it shares with others; entering it waits.

    Without shared stages there is no lock and nothing to wait for.

    Raises:
        StopRequested: a stop signal arrived while waiting.
    """

    def __init__(
        self, run: SweepRun, others: Sequence[SweepRun], stop: StopSignals, *, log: Callable[[str], None]
    ) -> None:
        self._stop = stop
        self._log = log
        self._held = False
        self._lock: FileLock | None = None
        shared = count_shared_stages(run, others)
        if shared:
            common = Path(os.path.commonpath([os.path.dirname(os.path.realpath(other.folder)) for other in others]))
            common.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(common / f".shared-{fingerprint(run.plan.recipe_until(0))}.lock", warn=log)
            self._last_shared = run.checkpoint(shared - 1)

    def __enter__(self) -> SharedStageLock:
        """Wait until no other run trains the shared stages."""
        try:
            self._wait()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        self._close()

    def release_when_trained(self) -> None:
        """Release the lock if the last shared stage has its checkpoint; call it regularly while the run trains."""
        if self._lock is None or not self._held:
            return
        with suppress(AccessError):  # not known yet: the lock stays until the run ends
            if is_there(self._last_shared / MANIFEST_FILE):
                self._release()

    def _wait(self) -> None:
        if self._lock is None:
            return
        waiting = False
        while not self._lock.acquire():
            if not waiting:
                holder = self._lock.holder()
                self._log(f"  waiting for the run that trains the shared stages{f' ({holder})' if holder else ''}")
            waiting = True
            if self._stop.received:
                raise StopRequested
            time.sleep(POLL_S)
        self._held = True

    def _release(self) -> None:
        if self._lock is not None and self._held:
            self._lock.release()
            self._held = False

    def _close(self) -> None:
        self._release()
        if self._lock is not None:
            self._lock.close()


def _longest_trained(run: SweepRun, others: Sequence[SweepRun]) -> tuple[SweepRun | None, int]:
    """The other run that has trained most of the stages that it shares with this one, and their number."""
    donor: SweepRun | None = None
    count = 0
    for other in others:
        trained = 0
        for index in range(_equal_stages(run, other)):
            trained = index + 1 if has_checkpoint(other.checkpoint(index), run.plan, index) else trained
        if trained > count and other.folder != run.folder:
            donor = other
            count = trained
    return donor, count


def _linked_checkpoints(donor: SweepRun, plan: Plan, stage_index: int) -> list[Path]:
    folders = matching(donor.folder / plan.stages[stage_index].name, "step-*")
    return [folder for folder in folders if has_checkpoint(folder, plan, stage_index, kinds=_LINKED_KINDS)]


def _equal_stages(run: SweepRun, other: SweepRun) -> int:
    """The number of first stages that give both runs the same weights and the same measurements."""
    if not _has_equal_validation(run, other) or not _has_equal_numerics(run, other):
        return 0
    count = 0
    for index in range(min(len(run.plan.stages), len(other.plan.stages))):
        if differences(run.plan.recipe_until(index), other.plan.recipe_until(index)):
            break
        if _training_data(run, index) != _training_data(other, index):
            break
        if run.plan.stages[index].local_batch_size != other.plan.stages[index].local_batch_size:
            break  # sums are rounded otherwise
        if _average(run.plan.stages[index]) != _average(other.plan.stages[index]):
            break  # its checkpoints hold another average, from which a later stage may start, or none
        count = index + 1
    return count


def _average(stage: StagePlan) -> dict[str, Any] | None:
    """What determines the average of a stage's weights; None without."""
    averaging = stage.averaging
    return None if averaging is None else {**averaging.settings, "phase": averaging.phase}


def _has_equal_validation(run: SweepRun, other: SweepRun) -> bool:
    """Whether the other run's losses count for this one: the same validation sequences, at the same steps."""
    a = run.config
    b = other.config
    files = {name: table.validation for name, table in b.datasets.items() if table.validation}
    same = all(name in a.datasets and a.datasets[name].validation == paths for name, paths in files.items())
    return same and a.validation == b.validation and a.tokenizer.path == b.tokenizer.path


def _has_equal_numerics(run: SweepRun, other: SweepRun) -> bool:
    """Whether an equal recipe gives both runs the same bits; rounding and skipped batches depend on more than that."""
    a = run.config
    b = other.config
    same = all(
        getattr(a, table).model_dump(exclude=_NON_NUMERIC_KEYS)
        == getattr(b, table).model_dump(exclude=_NON_NUMERIC_KEYS)
        for table in _NUMERIC_TABLES
    )
    return same and a.job.deterministic == b.job.deterministic


def _training_data(run: SweepRun, stage_index: int) -> dict[str, Any]:
    """The [datasets] tables that a stage trains on, replay included, without the keys that only validation reads."""
    names = {leaf.source.partition(".")[0] for leaf in leaves(run.plan.stages[stage_index].tree)}
    exclude: dict[str, Any] = dict.fromkeys(_VALIDATION_KEYS, True) | {"domains": {"__all__": _VALIDATION_KEYS}}
    return {name: run.config.datasets[name].model_dump(exclude=exclude) for name in sorted(names)}
