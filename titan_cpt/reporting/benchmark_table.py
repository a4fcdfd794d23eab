"""Benchmark scores in a run folder: after each stage, and their change between stages; and the generated examples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from titan_cpt.checkpoint import manifest
from titan_cpt.common.reading import read_text
from titan_cpt.common.run_folder import EVALUATIONS_FOLDER, GENERATIONS_FILE, checkpoint_folder
from titan_cpt.common.weights.named_weights import AVERAGE, split_average, suffix_of
from titan_cpt.errors import TitanError
from titan_cpt.evaluation.scores import Score, read_scores, score_change
from titan_cpt.reporting.run_log import RunLog

_TaskKey = tuple[str, int, int | None]  # name, number of few-shot examples, limit of samples


@dataclass(frozen=True)
class BenchmarkTable:
    """Scores of one run: one row per task, one column per stage in the order of training, then the changes."""

    head: list[str]
    rows: list[list[str]]


def benchmark_table(run: RunLog, report_error: Callable[[str], None]) -> BenchmarkTable | None:
    """Each task's score after each stage, with its standard error, and the change from stage to stage.

    Scores of a stage's average are in a column STAGE@average behind the stage's own, and are compared with these if
    both are of the same step. If several checkpoints of a stage were evaluated, the last one counts. Scores of
    checkpoints whose steps were undone and trained again do not count. A change comes with its standard error and
    p-value (see `score_change`).

    Args:
        report_error: called with a sentence for each score that cannot be read.

    Returns:
        The table, or None if the run has no scores.
    """
    found: dict[_TaskKey, dict[str, Score]] = {}
    columns: dict[str, set[str]] = {}  # by stage: its name, and STAGE@average
    for score in read_scores(run.folder, report_error):  # in the order of training: a stage's last score wins
        if not _is_current(run, score.stage, score.steps_done, score.identity.get("files")):
            continue
        label = f"{score.stage}{suffix_of(score.average)}"
        found.setdefault((score.task, score.shots, score.limit), {})[label] = score
        columns.setdefault(score.stage, set()).add(label)
    if not found:
        return None
    stages = [label for labels in columns.values() for label in sorted(labels)]
    pairs = list(pairwise([label for label in stages if not split_average(label)[1]]))
    pairs += [(stage, label) for label in stages if (stage := split_average(label)[0]) != label and stage in stages]
    head = ["task", "shots", "metric", "samples", *(f"after {stage}" for stage in stages)]
    head += [f"change from {earlier} to {later}" for earlier, later in pairs]
    rows = []
    for (task, shots, limit), by_stage in sorted(
        found.items(), key=lambda item: (item[0][0], item[0][1], item[0][2] or 0)
    ):
        some = next(iter(by_stage.values()))
        row = [task, str(shots), some.metric, f"{some.samples:,}{'' if limit is None else ' (limited)'}"]
        row += [_value(by_stage.get(stage)) for stage in stages]
        row += [_change(by_stage, earlier, later, some.metric) for earlier, later in pairs]
        rows.append(row)
    return BenchmarkTable(head, rows)


def example_generations(run: RunLog, report_error: Callable[[str], None]) -> list[tuple[str, str]]:
    """(prompt, text generated from it after each stage) for each example prompt of `generate --examples`.

    Args:
        report_error: called with a sentence for each file that cannot be read.
    """
    latest: dict[tuple[int, bool], tuple[int, str, list[Mapping[str, str]]]] = {}  # by stage index, of the average
    for path in sorted((run.folder / EVALUATIONS_FOLDER).glob(f"**/{GENERATIONS_FILE}")):
        try:
            found = json.loads(read_text(path))
            generated = int(found["steps_done"]), str(found["stage"]), list(found["texts"])
            index = int(found["stage_index"]), found.get("weights") == AVERAGE
            files = found.get("files")
        except TitanError as error:
            report_error(str(error))
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            report_error(f"{path}: cannot be read: {error}. Remove it and run `titan-cpt generate --examples` again")
            continue
        if _is_current(run, generated[1], generated[0], files):
            latest[index] = max(latest.get(index, (-1, "", [])), generated, key=lambda one: one[0])
    by_prompt: dict[str, list[str]] = {}
    for (_, average), (steps, stage, texts) in sorted(latest.items(), key=lambda item: item[0]):
        for text in texts:
            entry = f"after {stage}{suffix_of(average)} ({steps:,} steps): {text['prompt']}{text['continuation']}"
            by_prompt.setdefault(text["prompt"], []).append(entry)
    return [(prompt, "\n\n".join(texts)) for prompt, texts in by_prompt.items()]


def _is_current(run: RunLog, stage: str, step: int, files: str | None) -> bool:
    """Whether an evaluated checkpoint belongs to the run's present weights; its steps may have been trained again.

    Args:
        files: digest of the checkpoint's files at the evaluation; None for results of older versions.
    """
    saved = [event.get("files") for event in run.checkpoints if (event["stage"], event["step"]) == (stage, step)]
    if files is not None:
        try:
            return manifest.digest_of_files(manifest.read(checkpoint_folder(run.folder, stage, step))) == files
        except TitanError:  # the checkpoint was removed, or is unreadable: the log has its digest
            if any(saved):
                return files in saved
    lines = [*run.trains, *run.validations, *run.checkpoints]
    return step <= max((line["step"] for line in lines if line["stage"] == stage), default=-1)


def _value(score: Score | None) -> str:
    if score is None:
        return ""
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")


def _change(by_stage: Mapping[str, Score], earlier: str, later: str, metric: str) -> str:
    if earlier not in by_stage or later not in by_stage or metric not in by_stage[later].metrics:
        return ""
    same_stage = by_stage[earlier].stage == by_stage[later].stage
    if same_stage and by_stage[earlier].steps_done != by_stage[later].steps_done:
        return ""
    change = score_change(by_stage[earlier], by_stage[later], metric)
    if change.stderr is None or change.p is None:
        return f"{change.value:+.4f}"
    p = "< 0.0001" if change.p < 1e-4 else f"= {change.p:.4f}"
    return f"{change.value:+.4f} ± {change.stderr:.4f} (p {p}{'' if change.paired else ', other samples'})"
