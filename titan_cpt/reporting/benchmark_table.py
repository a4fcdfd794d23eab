"""What a run's folder holds of benchmarks: scores after each stage, what each stage changed, and continued prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from titan_cpt.checkpoint import manifest
from titan_cpt.common.reading import read_text
from titan_cpt.common.run_folder import EVALUATIONS_FOLDER, GENERATIONS_FILE, checkpoint_folder
from titan_cpt.errors import TitanError
from titan_cpt.evaluation.scores import Score, read_scores, score_change
from titan_cpt.reporting.run_log import RunLog


@dataclass(frozen=True)
class BenchmarkTable:
    """Scores of one run: a row for each task, the stages in the order of training."""

    head: list[str]
    rows: list[list[str]]


def benchmark_table(record: RunLog, complain: Callable[[str], None]) -> BenchmarkTable | None:
    """Every task's score after each stage, with its standard error, and what each further stage changed.

    Of a stage that was evaluated several times the last evaluation counts. A change stands with the standard error and
    the p of `difference`, sample by sample where the same samples were asked. Scores of checkpoints that were removed
    and trained again do not count. None without any score.

    Args:
        complain: called with a sentence for each score that cannot be read.
    """
    found: dict[tuple[str, int, int | None], dict[str, Score]] = {}
    stages: list[str] = []
    for score in read_scores(record.folder, complain):  # in the order of training, so that the last of a stage stays
        if not _is_of_present_weights(record, score.stage, score.steps_done, score.identity.get("files")):
            continue
        found.setdefault((score.task, score.shots, score.limit), {})[score.stage] = score
        if score.stage not in stages:
            stages.append(score.stage)
    if not found:
        return None
    pairs = list(pairwise(stages))
    head = ["task", "shots", "metric", "samples", *(f"after {stage}" for stage in stages)]
    head += [f"change from {earlier} to {later}" for earlier, later in pairs]
    rows = []
    for (task, shots, limit), by_stage in sorted(
        found.items(), key=lambda item: (item[0][0], item[0][1], item[0][2] or 0)
    ):
        some = next(iter(by_stage.values()))
        row = [task, str(shots), some.metric, f"{some.samples:,}{'' if limit is None else ' (of more)'}"]
        row += [_value(by_stage.get(stage)) for stage in stages]
        row += [_change(by_stage, earlier, later, some.metric) for earlier, later in pairs]
        rows.append(row)
    return BenchmarkTable(head, rows)


def example_generations(record: RunLog, complain: Callable[[str], None]) -> list[tuple[str, str]]:
    """Each example prompt, and the text that the run made of it after each stage.

    Args:
        complain: called with a sentence for each file that cannot be read.
    """
    kept: dict[int, tuple[int, str, list[Mapping[str, str]]]] = {}
    for path in sorted((record.folder / EVALUATIONS_FOLDER).glob(f"**/{GENERATIONS_FILE}")):
        try:
            found = json.loads(read_text(path))
            place = int(found["steps_done"]), str(found["stage"]), list(found["texts"])
            index, files = int(found["stage_index"]), found.get("files")
        except TitanError as error:
            complain(str(error))
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            complain(f"{path}: cannot be read: {error}. Remove it and continue the examples again")
            continue
        if not _is_of_present_weights(record, place[1], place[0], files):
            continue
        kept[index] = max(kept.get(index, (-1, "", [])), place, key=lambda one: one[0])
    by_prompt: dict[str, list[str]] = {}
    for _, (steps, stage, texts) in sorted(kept.items()):
        for text in texts:
            told = f"after {stage} ({steps:,} steps): {text['prompt']}{text['continuation']}"
            by_prompt.setdefault(text["prompt"], []).append(told)
    return [(prompt, "\n\n".join(texts)) for prompt, texts in by_prompt.items()]


def _is_of_present_weights(record: RunLog, stage: str, step: int, files: str | None) -> bool:
    """Whether what was found out of a checkpoint still holds: its stage may have been removed and trained again.

    Args:
        files: digest of the checkpoint's files; None where an older version did not keep it.
    """
    saved = [event.get("files") for event in record.checkpoints if (event["stage"], event["step"]) == (stage, step)]
    if files is not None:
        try:
            return manifest.digest_of_files(manifest.read(checkpoint_folder(record.folder, stage, step))) == files
        except TitanError:  # pruned, or unreadable: the record knows which one it was
            if any(saved):
                return files in saved
    lines = [*record.trains, *record.validations, *record.checkpoints]
    return step <= max((line["step"] for line in lines if line["stage"] == stage), default=-1)


def _value(score: Score | None) -> str:
    if score is None:
        return ""
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")


def _change(by_stage: Mapping[str, Score], earlier: str, later: str, metric: str) -> str:
    if earlier not in by_stage or later not in by_stage or metric not in by_stage[later].metrics:
        return ""
    change = score_change(by_stage[earlier], by_stage[later], metric)
    if change.stderr is None or change.p is None:
        return f"{change.value:+.4f}"
    p = "< 0.0001" if change.p < 1e-4 else f"= {change.p:.4f}"
    return f"{change.value:+.4f} ± {change.stderr:.4f} (p {p}{'' if change.paired else ', other samples'})"
