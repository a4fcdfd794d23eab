"""Checks between tables: names of stages, references to datasets and to earlier stages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from titan_cpt.common.run_folder import RESERVED_STAGE_NAMES
from titan_cpt.common.text import did_you_mean, quoted_list
from titan_cpt.common.weights.named_weights import named_weights, split_average


def tables_in(value: Any) -> dict[str, dict[str, Any]]:
    """The tables directly inside a raw table; other values, which are mistakes, are skipped."""
    return {k: v for k, v in value.items() if isinstance(v, dict)} if isinstance(value, dict) else {}


def reference_faults(raw: dict[str, Any]) -> Iterator[str]:
    """Every reference that does not resolve, as `dotted.key: message`.

    Works on the raw file, which may have other faults, so that a user sees all of them at once.
    """
    datasets = tables_in(raw.get("datasets"))
    stages = raw.get("stages")
    earlier: list[str] = []
    for index, stage in enumerate(stages if isinstance(stages, list) else []):
        if isinstance(stage, dict):
            name = str(stage.get("name", f"[{index}]"))
            yield from _stage_faults(stage, name, earlier, datasets)
            earlier.append(name)
    for key, made in tables_in(raw.get("tokenizer")).items():
        yield from _tokenizer_text_faults(f"tokenizer.{key}.dataset", made.get("dataset"), datasets)


def _stage_faults(
    stage: dict[str, Any], name: str, earlier: list[str], datasets: dict[str, dict[str, Any]]
) -> Iterator[str]:
    where = f"stages.{name}"
    if name in earlier:
        yield f"{where}.name: two stages have this name; choose another name"
    elif name in RESERVED_STAGE_NAMES:
        yield f"{where}.name: is reserved for the folder {name}/ of every run; choose another name"
    if ("steps" in stage) == ("tokens" in stage):
        yield f"{where}: must have exactly one of steps and tokens, got {'both' if 'steps' in stage else 'neither'}"
    if isinstance(stage.get("dataset"), list):
        example = "{ pile = 0.5, slimpajama = 0.5 }"
        yield f"{where}.dataset: must be a name or a table of weights such as {example}, got a list"
    yield from _dataset_faults(f"{where}.dataset", stage.get("dataset"), datasets)
    replay = stage.get("replay")
    if isinstance(replay, dict):
        yield from _dataset_faults(f"{where}.replay.from", replay.get("from"), datasets)
    if isinstance(stage.get("lr"), dict) and stage["lr"].get("schedule") == "continue":
        yield from _continued_schedule_faults(stage, name, earlier)
    else:
        yield from _init_faults(stage, name, earlier)
    yield from _weak_rows_faults(stage, name, earlier)


def _dataset_faults(where: str, mixture: Any, datasets: dict[str, dict[str, Any]]) -> Iterator[str]:
    known = list(datasets)
    for name in _names_in(mixture):
        if name not in datasets:
            yield f"{where}: there is no [datasets.{name}]{did_you_mean(name, known)}; there are {quoted_list(known)}"
        elif not (datasets[name].get("train") or datasets[name].get("domains")):
            yield f"{where}: [datasets.{name}] has no tokens to train on: give it train or domains"


def _names_in(mixture: Any) -> list[str]:
    if isinstance(mixture, dict) and isinstance(mixture.get("of"), list):  # weights by tokens
        mixture = mixture["of"]
    names = [mixture] if isinstance(mixture, str) else list(mixture) if isinstance(mixture, list | dict) else []
    return [name for name in names if isinstance(name, str)]


def _init_faults(stage: dict[str, Any], name: str, earlier: list[str]) -> Iterator[str]:
    init = stage.get("init", "previous" if earlier else "random")
    where = f"stages.{name}.init"
    if not isinstance(init, str):
        return  # the schema reports the wrong type
    kind, _, target = init.partition(":")
    average = kind in ("stage", "checkpoint") and _names_average(kind, target)
    if init == "previous" and not earlier:
        yield f"{where}: the first stage has no previous one; allowed are random, checkpoint:PATH and hf:NAME"
    elif kind == "stage":
        base, _, point = split_average(target)[0].partition("@")
        if base not in earlier or point not in ("", "pre_anneal"):
            forms = "stage:NAME or stage:NAME@pre_anneal, either with @average at its end"
            yield f"{where}: must name an earlier stage as {forms}, got {init!r}; earlier are {quoted_list(earlier)}"
    elif init not in ("previous", "random") and not (kind in ("checkpoint", "hf") and target):
        allowed = (
            "previous, random, stage:NAME, stage:NAME@pre_anneal, stage:NAME@average, checkpoint:PATH, "
            "checkpoint:PATH@average, hf:PATH-OR-NAME"
        )
        yield f"{where}: must be one of {allowed}, got {init!r}"
    if stage.get("optimizer_state") == "keep" and (init == "random" or kind == "hf"):
        yield f"stages.{name}.optimizer_state: init = {init!r} has no optimizer state to keep; set it to reset"
    elif stage.get("optimizer_state") == "keep" and average:
        yield (
            f"stages.{name}.optimizer_state: the moments in the checkpoint belong to the weights that training "
            f"continues with, not to their average, from which init = {init!r} starts; set it to reset, or to "
            "warm:100, which warms moments of the average up"
        )


def _weak_rows_faults(stage: dict[str, Any], name: str, earlier: list[str]) -> Iterator[str]:
    init = stage.get("init", "previous" if earlier else "random")
    if stage.get("weak_rows") is None or not isinstance(init, str):
        return
    where = f"stages.{name}.weak_rows"
    if not init.startswith(("hf:", "checkpoint:")):
        yield (
            f"{where}: is for weights from outside of the run (init = hf:NAME or checkpoint:PATH), this stage's are "
            f"init = {init!r}; remove it"
        )
    elif stage["weak_rows"] == "mean" and stage.get("optimizer_state") == "keep":
        yield (
            f'{where}: "mean" replaces rows whose moments optimizer_state = "keep" would keep; set optimizer_state to '
            "reset"
        )


def _names_average(kind: str, target: str) -> bool:
    """Whether an `init` names an average; a local folder may have a name that ends in @average."""
    if kind == "stage" or "://" in target:
        return split_average(target)[1]
    return named_weights(target).average


def _continued_schedule_faults(stage: dict[str, Any], name: str, earlier: list[str]) -> Iterator[str]:
    """A schedule that spans several stages is one training run: weights and optimizer state go from stage to stage."""
    if not earlier:
        yield (
            f'stages.{name}.lr.schedule: "continue" continues the schedule of the stage before, and this stage is the '
            'first: give it a schedule such as "cosine"'
        )
        return
    init = stage.get("init", "previous")
    if init not in ("previous", f"stage:{earlier[-1]}"):
        yield (
            f'stages.{name}.init: with lr.schedule = "continue" a stage starts from the end of the stage before, '
            f"{earlier[-1]!r}, got {init!r}: remove init, or give this stage a schedule of its own"
        )
    if stage.get("optimizer_state", "keep") != "keep":
        yield (
            f'stages.{name}.optimizer_state: with lr.schedule = "continue" the optimizer state is kept, got '
            f"{stage['optimizer_state']!r}: remove the key, or give this stage a schedule of its own"
        )


def _tokenizer_text_faults(where: str, name: Any, datasets: dict[str, dict[str, Any]]) -> Iterator[str]:
    if not isinstance(name, str):
        return
    yield from _dataset_faults(where, name, datasets)
    if name in datasets and "source" not in datasets[name]:
        yield f"{where}: [datasets.{name}] has no source, so there is no text to train a tokenizer on; give it one"
