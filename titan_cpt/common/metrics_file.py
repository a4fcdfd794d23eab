"""Reading metrics.jsonl: which of its lines describe the weights that the run has now. Does not import torch.

The file is only ever appended to. After a crash, a rollback or a stage that is trained again it also holds lines of
steps that were undone; every reader (report, figures, comparison, model card, branches, sweeps, forgetting) goes
through `read_metrics`, which leaves those out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from titan_cpt.common.run_folder import METRICS_FILE
from titan_cpt.errors import DataError

Line = dict[str, Any]

_NEEDED: dict[str, dict[str, type | tuple[type, ...]]] = {
    "train": {"stage": str, "step": int},
    "validation": {"stage": str, "step": int, "dataset": str, "loss_nats_per_token": (int, float, type(None))},
    "event": {"name": str},
}
_NUMBERS = (  # or null, where a step or a measurement has them: what is not finite is written as null
    *("loss_nats_per_token", "forgetting_nats_per_token", "perplexity", "bits_per_byte", "grad_norm", "lr"),
    *("tokens_per_s", "mfu", "memory_gib", "tokens", "run_step", "replayed_tokens"),
)


@dataclass
class Metrics:
    """What metrics.jsonl says of the run's present weights, each thing once, in the order in which it was written.

    Attributes:
        trains: lines of steps.
        validations: lines of measurements.
        renewed: measurements of a stage's first weights that were made again later, on other validation data.
        checkpoints: `checkpoint` events of present weights, as far as they name their stage and step.
        events: all events, those of undone steps too.
        problems: a sentence for each thing that could not be read and was skipped.
    """

    trains: list[Line] = field(default_factory=list)
    validations: list[Line] = field(default_factory=list)
    renewed: list[Line] = field(default_factory=list)
    checkpoints: list[Line] = field(default_factory=list)
    events: list[Line] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_metrics(run: Path, stages: Sequence[str] = ()) -> Metrics:
    """The lines of a run's metrics.jsonl that count.

    Undone are, in the order of the file:
    - at a `transition` event: all lines of its stage and of later stages, which are trained again from there; those
      of its step 0 stay where a rollback (a `skip_batch` right before it) went back to the same first weights;
    - at a `resume` event: lines of its stage behind its step, and of later stages;
    - at a `skip_batch` event: lines of its stage from its step on, and at a `stop` event those behind its step: the
      update guard held these steps back;
    - at the line of a step that is not above the one before it (where such an event was lost): the lines of its stage
      from that step on, and of later stages.

    Args:
        stages: names in the order of the plan; others follow in the order in which the file names them.

    Raises:
        DataError: there is no such file, or it cannot be opened. A damaged line is skipped and put into `problems`.
    """
    found, damaged = Metrics(), list[int]()
    history = _History(stages)
    path = run / METRICS_FILE
    number = 0
    for number, line in _parsed(path):
        if line is None:
            damaged.append(number)
        elif line["kind"] == "event":
            found.events.append(line)
            history.event(line)
        elif line["kind"] in ("train", "validation"):
            history.measured(line)
    if damaged and damaged[-1] == number and _is_cut(path):
        damaged.pop()
        found.problems.append(f"{path}: its last line is incomplete (a crash, or it is being written) and was skipped")
    if damaged:
        more = f" and {len(damaged) - 1:,} more" if len(damaged) > 1 else ""
        found.problems.append(f"{path}:{damaged[0]}: damaged line skipped{more}; what it recorded is unknown")
    found.trains, found.validations, found.checkpoints = history.lines()
    found.renewed = history.renewed()
    return found


def losses_before(metrics: Metrics) -> dict[tuple[str, str], tuple[float, str | None]]:
    """By (stage, dataset), the loss at step 0 from which forgetting is counted, and the identity of what was measured.

    Lines of older versions name no identity: None.
    """
    return {
        (line["stage"], line["dataset"]): (line["loss_nats_per_token"], line.get("validation_id"))
        for line in [*metrics.validations, *metrics.renewed]
        if line["step"] == 0 and line["loss_nats_per_token"] is not None
    }


def open_record(path: Path) -> FileIO:
    """Open metrics.jsonl to append, unbuffered; a last line that a kill cut short is removed."""
    path.touch()
    with path.open("rb+") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        if _parse(content[end:].decode(errors="replace")) is not None:
            file.write(b"\n")  # whole, without the newline at its end
        else:
            file.truncate(end)
    return path.open("ab", buffering=0)


class _History:
    """Lines by stage; later lines undo earlier ones."""

    def __init__(self, stages: Sequence[str]) -> None:
        self._places = {name: place for place, name in enumerate(stages)}
        self._trains: dict[str, dict[int, Line]] = {}
        self._validations: dict[str, dict[tuple[int, str], Line]] = {}
        self._checkpoints: dict[str, dict[int, Line]] = {}
        self._renewed: dict[str, dict[tuple[int, str], Line]] = {}
        self._skipped_in: str | None = None  # the stage of the last event, if that was a `skip_batch`

    def event(self, line: Line) -> None:
        """Take an event into account."""
        stage, step, name = line.get("stage"), line.get("step"), line["name"]
        rolls_back, self._skipped_in = self._skipped_in == stage, stage if name == "skip_batch" else None
        if not isinstance(stage, str) or not isinstance(step, int):
            return
        self._place(stage)
        if name in ("transition", "resume"):
            self._undo(stage, after=step if name == "resume" or rolls_back else -1)
            self._undo_later_than(stage)
        elif name in ("skip_batch", "stop"):
            self._undo(stage, after=step if name == "stop" else step - 1)
        elif name == "checkpoint":
            self._checkpoints.setdefault(stage, {})[step] = line

    def measured(self, line: Line) -> None:
        """Take the line of a step or of a measurement into account."""
        stage, step = line["stage"], line["step"]
        self._place(stage)
        if line["kind"] == "validation":
            kept = self._renewed if line.get("measured_again") else self._validations
            kept.setdefault(stage, {})[step, line["dataset"]] = line
            return
        trains = self._trains.setdefault(stage, {})
        if trains and step <= next(reversed(trains)):
            self._undo(stage, after=step - 1)
            self._undo_later_than(stage)
        trains[step] = line

    def lines(self) -> tuple[list[Line], list[Line], list[Line]]:
        """Lines of steps, of measurements and of checkpoints, in the order of the stages, then of steps."""
        order = sorted(self._places, key=self._places.__getitem__)
        trains = [line for name in order for _, line in sorted(self._trains.get(name, {}).items())]
        saved = [line for name in order for _, line in sorted(self._checkpoints.get(name, {}).items())]
        measured = [
            line
            for name in order
            for _, line in sorted(self._validations.get(name, {}).items(), key=lambda item: item[0][0])
        ]
        return trains, measured, saved

    def renewed(self) -> list[Line]:
        """Measurements that were made again."""
        return [line for lines in self._renewed.values() for line in lines.values()]

    def _place(self, stage: str) -> int:
        return self._places.setdefault(stage, len(self._places))

    def _undo(self, stage: str, *, after: int) -> None:
        for lines in (self._trains, self._checkpoints):
            for step in [step for step in lines.get(stage, ()) if step > after]:
                del lines[stage][step]
        for of in (self._validations, self._renewed):
            for key in [key for key in of.get(stage, ()) if key[0] > after]:
                del of[stage][key]

    def _undo_later_than(self, stage: str) -> None:
        for other, place in self._places.items():
            if place > self._places[stage]:
                self._undo(other, after=-1)


def _parsed(path: Path) -> Iterator[tuple[int, Line | None]]:
    """Number and content of every line; None for a damaged one."""
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for number, text in enumerate(file, 1):
                yield number, _parse(text)
    except OSError as error:
        absent = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        remedy = "Name the folder of a run" if absent else "Change its permissions or repair the file system"
        raise DataError(f"{path}: cannot be read: {error.strerror}. {remedy}") from None


def _parse(text: str) -> Line | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and _is_whole(line) else None


def _is_whole(line: Mapping[str, Any]) -> bool:
    kind = line.get("kind")
    if not isinstance(kind, str):
        return False
    if kind != "event" and not all(_is_number(line.get(key)) for key in _NUMBERS):
        return False
    return all(key in line and isinstance(line[key], types) for key, types in _NEEDED.get(kind, {}).items())


def _is_number(value: Any) -> bool:
    """Null, or a number that arithmetic with floats does not end at."""
    return value is None or (isinstance(value, int | float) and not (isinstance(value, int) and abs(value) > 1e100))


def _is_cut(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1))
        return file.read() != b"\n"
