"""Reading metrics.jsonl: the lines that describe the run's current weights.

The file is append-only. After a crash, a rollback or a stage that was trained again it also has lines of steps that
were undone. Every reader (report, figures, comparison, model card, branches, sweeps, forgetting) uses `read_metrics`,
which drops those lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from titan_cpt.common.run_folder import METRICS_FILE
from titan_cpt.errors import DataError

Line = dict[str, Any]

_REQUIRED_KEYS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "train": {"stage": str, "step": int},
    "validation": {"stage": str, "step": int, "dataset": str, "loss_nats_per_token": (int, float, type(None))},
    "metric": {"stage": str, "step": int, "metric": str, "name": str, "value": (int, float, type(None))},
    "event": {"name": str},
}
_HEAD_BYTES = 256
_NUMERIC_KEYS = (  # keys whose value, if present, is a number or null; a value that is not finite is written as null
    *("loss_nats_per_token", "forgetting_nats_per_token", "perplexity", "bits_per_byte", "grad_norm", "lr"),
    *("tokens_per_s", "mfu", "memory_gib", "memory_active_gib", "tokens", "run_step", "replayed_tokens"),
)


@dataclass
class Metrics:
    """The lines of metrics.jsonl that describe the run's current weights, without duplicates.

    Attributes:
        trains: one line for each training step.
        validations: one line for each validation of a dataset.
        renewed: validations of a stage's initial weights that were repeated later on other validation data.
        registered: one line for each value of a metric of another package.
        checkpoints: `checkpoint` events that name their stage and step.
        events: all events in the order of the file, including those of undone steps.
        problems: one sentence for each damaged part of the file that was skipped.
    """

    trains: list[Line] = field(default_factory=list)
    validations: list[Line] = field(default_factory=list)
    renewed: list[Line] = field(default_factory=list)
    registered: list[Line] = field(default_factory=list)
    checkpoints: list[Line] = field(default_factory=list)
    events: list[Line] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_metrics(run: Path, stages: Sequence[str] = (), *, last_bytes: int | None = None) -> Metrics:
    """Read a run's metrics.jsonl and drop the lines of steps that were undone.

    These lines are dropped, as the file is read from top to bottom:
    - at a `transition` event: all earlier lines of its stage and of later stages, which are trained again. The lines of
      step 0 stay if a rollback (a `skip_batch` directly before it) returned to the same initial weights;
    - at a `resume` event: lines of its stage after its step, and of later stages;
    - at a `skip_batch` event: lines of its stage from its step on, and at a `stop` event those after its step, because
      the update guard did not apply these steps;
    - at a training step that is not greater than the one before it, where such an event was lost: the lines of its
      stage from that step on, and of later stages.

    Args:
        run: the run's folder.
        stages: names of the stages in the order of the plan; other stages follow in the order of the file.
        last_bytes: read only the lines within this many bytes of the end of the file; None for all.

    Raises:
        DataError: the file is missing or cannot be opened. A damaged line is skipped and reported in `problems`.
    """
    metrics = Metrics()
    damaged: list[int] = []
    store = _WholeLines()
    history = MetricsHistory(stages, store)
    path = run / METRICS_FILE
    number = 0
    for number, line in _parsed(path, last_bytes):
        if line is None:
            damaged.append(number)
            continue
        if line["kind"] == "event":
            metrics.events.append(line)
        history.add(line)
    if damaged and damaged[-1] == number and _lacks_final_newline(path):
        damaged.pop()
        metrics.problems.append(
            f"{path}: skipped its last line, which is incomplete (after a crash, or while it is being written)"
        )
    if damaged:
        more = f" and {len(damaged) - 1:,} more" if len(damaged) > 1 else ""
        metrics.problems.append(f"{path}:{damaged[0]}: skipped a damaged line{more}")
    metrics.trains, metrics.validations, metrics.checkpoints = store.lines(history.stages)
    metrics.renewed = store.renewed()
    metrics.registered = store.registered(history.stages)
    return metrics


def baseline_losses(metrics: Metrics) -> dict[tuple[str, str], tuple[float, str | None]]:
    """{(stage, dataset): (loss, identity)}: the validation losses at step 0, from which forgetting is measured.

    The identity names the validation data; it is None in lines of older versions, which do not have it.
    """
    return {
        (line["stage"], line["dataset"]): (line["loss_nats_per_token"], line.get("validation_id"))
        for line in [*metrics.validations, *metrics.renewed]
        if line["step"] == 0 and line["loss_nats_per_token"] is not None
    }


def open_metrics_file(path: Path) -> FileIO:
    """Open metrics.jsonl for appending, unbuffered, after removing a last line that a kill left incomplete."""
    path.touch()
    with path.open("rb+") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        if parse_line(content[end:].decode(errors="replace")) is not None:
            file.write(b"\n")  # a complete line that lacks only its newline
        else:
            file.truncate(end)
    return path.open("ab", buffering=0)


class LineStore(Protocol):
    """Where `MetricsHistory` keeps what still counts. Lines arrive in the order of the file."""

    def add_train(self, line: Line) -> None:
        """A training step, later than `last_train_step` of its stage."""

    def add_validation(self, line: Line) -> None:
        """A validation of a dataset; it replaces an earlier one of the same stage, step and dataset."""

    def add_metric(self, line: Line) -> None:
        """A value of a metric of another package."""

    def add_checkpoint(self, line: Line) -> None:
        """A `checkpoint` event."""

    def last_train_step(self, stage: str) -> int | None:
        """The last training step of a stage, if it has one."""

    def undo(self, stage: str, *, after: int) -> None:
        """Drop all lines of a stage that belong to a step after this one."""


class MetricsHistory:
    """Applies the rules of `read_metrics` line by line: later lines undo earlier ones.

    Args:
        stages: names of the stages in the order of the plan; other stages follow in the order of the file.
    """

    def __init__(self, stages: Sequence[str], store: LineStore) -> None:
        self._stage_index = {name: index for index, name in enumerate(stages)}
        self._store = store
        self._skipped_in: str | None = None  # the stage of the last event, if that was a `skip_batch`

    @property
    def stages(self) -> list[str]:
        """Names of all stages, in order."""
        return sorted(self._stage_index, key=self._stage_index.__getitem__)

    def add(self, line: Line) -> None:
        """Process a line that `parse_line` has returned."""
        if line["kind"] == "event":
            self._add_event(line)
        elif line["kind"] in ("train", "validation", "metric"):
            self._add_measurement(line)

    def _add_event(self, line: Line) -> None:
        stage, step, name = line.get("stage"), line.get("step"), line["name"]
        rolls_back = self._skipped_in == stage
        self._skipped_in = stage if name == "skip_batch" else None
        if not isinstance(stage, str) or not isinstance(step, int):
            return
        self._index_of(stage)
        if name in ("transition", "resume"):
            self._store.undo(stage, after=step if name == "resume" or rolls_back else -1)
            self._undo_later_than(stage)
        elif name in ("skip_batch", "stop"):
            self._store.undo(stage, after=step if name == "stop" else step - 1)
        elif name == "checkpoint":
            self._store.add_checkpoint(line)

    def _add_measurement(self, line: Line) -> None:
        stage, step = line["stage"], line["step"]
        self._index_of(stage)
        if line["kind"] == "validation":
            self._store.add_validation(line)
            return
        if line["kind"] == "metric":
            self._store.add_metric(line)
            return
        last = self._store.last_train_step(stage)
        if last is not None and step <= last:
            self._store.undo(stage, after=step - 1)
            self._undo_later_than(stage)
        self._store.add_train(line)

    def _index_of(self, stage: str) -> int:
        return self._stage_index.setdefault(stage, len(self._stage_index))

    def _undo_later_than(self, stage: str) -> None:
        for other, index in self._stage_index.items():
            if index > self._stage_index[stage]:
                self._store.undo(other, after=-1)


class _WholeLines:
    """Keeps the lines that still count, whole, by stage."""

    def __init__(self) -> None:
        self._trains: dict[str, dict[int, Line]] = {}
        self._validations: dict[str, dict[tuple[int, str], Line]] = {}
        self._checkpoints: dict[str, dict[int, Line]] = {}
        self._renewed: dict[str, dict[tuple[int, str], Line]] = {}
        self._registered: dict[str, dict[tuple[int, str, str], Line]] = {}

    def add_train(self, line: Line) -> None:
        self._trains.setdefault(line["stage"], {})[line["step"]] = line

    def add_validation(self, line: Line) -> None:
        lines = self._renewed if line.get("measured_again") else self._validations
        lines.setdefault(line["stage"], {})[line["step"], line["dataset"]] = line

    def add_metric(self, line: Line) -> None:
        self._registered.setdefault(line["stage"], {})[line["step"], line["metric"], line["name"]] = line

    def add_checkpoint(self, line: Line) -> None:
        self._checkpoints.setdefault(line["stage"], {})[line["step"]] = line

    def last_train_step(self, stage: str) -> int | None:
        return next(reversed(self._trains.get(stage, {})), None)

    def undo(self, stage: str, *, after: int) -> None:
        for lines in (self._trains, self._checkpoints):
            for step in [step for step in lines.get(stage, ()) if step > after]:
                del lines[stage][step]
        for validations in (self._validations, self._renewed):
            for key in [key for key in validations.get(stage, ()) if key[0] > after]:
                del validations[stage][key]
        for value in [key for key in self._registered.get(stage, ()) if key[0] > after]:
            del self._registered[stage][value]

    def lines(self, order: Sequence[str]) -> tuple[list[Line], list[Line], list[Line]]:
        """Lines of training steps, validations and checkpoints, ordered by stage, then by step."""
        trains = [line for name in order for _, line in sorted(self._trains.get(name, {}).items())]
        saved = [line for name in order for _, line in sorted(self._checkpoints.get(name, {}).items())]
        measured = [
            line
            for name in order
            for _, line in sorted(self._validations.get(name, {}).items(), key=lambda item: item[0][0])
        ]
        return trains, measured, saved

    def renewed(self) -> list[Line]:
        """Validations of initial weights that were repeated on other data."""
        return [line for lines in self._renewed.values() for line in lines.values()]

    def registered(self, order: Sequence[str]) -> list[Line]:
        """Values of metrics of other packages, ordered by stage, then by step."""
        found = (sorted(self._registered.get(name, {}).items(), key=lambda item: item[0][0]) for name in order)
        return [line for lines in found for _, line in lines]


class MetricsTail:
    """Reads the lines that were appended to a metrics.jsonl since the last call.

    Attributes:
        damaged_lines: number of lines that were skipped.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / METRICS_FILE
        self._head = b""  # the first bytes of the file: the time of its first event, which no other file has
        self._offset = 0  # behind the last complete line that was read: a start of the run cuts off an incomplete one
        self._size = 0
        self.damaged_lines = 0

    @property
    def share_read(self) -> float:
        """The part of the file that has been read, from 0 to 1."""
        return min(1.0, self._offset / self._size) if self._size else 1.0

    def was_replaced(self) -> bool:
        """Whether the file is another one than before: what was read no longer counts, and reading begins anew."""
        try:
            with self._path.open("rb") as file:
                head = file.read(_HEAD_BYTES)
                self._size = self._path.stat().st_size
        except OSError:
            return False
        replaced = self._size < self._offset or not head.startswith(self._head[: self._offset])
        if replaced:
            self._offset, self.damaged_lines = 0, 0
        self._head = head
        return replaced

    def read(self, most_bytes: int = 1 << 24) -> list[Line]:
        """The next complete lines that are not damaged; empty if there are none, or no file.

        Args:
            most_bytes: of the file, unless a line is longer; call again for the rest.

        Raises:
            OSError: the file may not be read, or is a folder.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                content = file.read(most_bytes)
                while len(content) >= most_bytes and b"\n" not in content and (more := file.read(most_bytes)):
                    content += more
        except (PermissionError, IsADirectoryError):
            raise
        except OSError:
            return []
        end = content.rfind(b"\n") + 1
        self._offset += end
        lines = [parse_line(text.decode(errors="replace")) for text in content[:end].split(b"\n")[:-1]]
        self.damaged_lines += lines.count(None)
        return [line for line in lines if line is not None]


def _parsed(path: Path, last_bytes: int | None) -> Iterator[tuple[int, Line | None]]:
    """(line number, content) of every line that is read; the content of a damaged line is None."""
    try:
        with path.open("rb") as file:
            start = 0 if last_bytes is None else max(0, path.stat().st_size - last_bytes)
            if start:
                file.seek(start - 1)
                file.readline()  # the rest of a line that begins before; nothing but a newline if none does
            for number, line in enumerate(file, 1):
                yield number, parse_line(line.decode("utf-8", errors="replace"))
    except OSError as error:
        absent = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        remedy = "Name the folder of a run" if absent else "Change its permissions or repair the file system"
        raise DataError(f"{path}: cannot be read: {error.strerror}. {remedy}") from None


def parse_line(text: str) -> Line | None:
    """The content of a line; None if it is damaged."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and _is_valid(line) else None


def _is_valid(line: Mapping[str, Any]) -> bool:
    kind = line.get("kind")
    if not isinstance(kind, str):
        return False
    if kind != "event" and not all(_is_number(line.get(key)) for key in _NUMERIC_KEYS):
        return False
    return all(key in line and isinstance(line[key], types) for key, types in _REQUIRED_KEYS.get(kind, {}).items())


def _is_number(value: Any) -> bool:
    """Whether a value is null, or a number that converts to a float."""
    return value is None or (isinstance(value, int | float) and not (isinstance(value, int) and abs(value) > 1e100))


def _lacks_final_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1))
        return file.read() != b"\n"


def table_curves(line: Mapping[str, Any]) -> dict[str, float]:
    """A `train` line's tables under their names in TensorBoard.

    These are train_by_source/X and replay_by_source/X, and the learning rates lr_by_group/PATTERN, with "all" for `*`,
    which MLflow and TensorBoard do not allow.
    """
    groups = {
        "loss_by_source": "train_by_source",
        "replay_loss_by_source": "replay_by_source",
        "lr_by_group": "lr_by_group",
    }
    curves = ((groups[key], name, value) for key in groups for name, value in (line.get(key) or {}).items())
    return {f"{group}/{name.replace('*', 'all')}": value for group, name, value in curves}
