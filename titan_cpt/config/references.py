"""References between tables: stages that name datasets and earlier stages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from titan_cpt.common.run_folder import RESERVED_STAGE_NAMES
from titan_cpt.common.text import did_you_mean, quoted_list


def tables(value: Any) -> dict[str, dict[str, Any]]:
    """The tables inside a raw table, whatever else it may hold by mistake."""
    return {k: v for k, v in value.items() if isinstance(v, dict)} if isinstance(value, dict) else {}


def _named(mix: Any) -> list[str]:
    names = [mix] if isinstance(mix, str) else list(mix) if isinstance(mix, list | dict) else []
    return [name for name in names if isinstance(name, str)]


def reference_faults(raw: dict[str, Any]) -> Iterator[str]:
    """Faults between tables, found on the raw file so that they can be told together with all others."""
    datasets = tables(raw.get("datasets"))
    stages = raw.get("stages")
    earlier: list[str] = []
    for place, stage in enumerate(stages if isinstance(stages, list) else []):
        if not isinstance(stage, dict):
            continue
        name = str(stage.get("name", f"[{place}]"))
        if name in earlier or name in RESERVED_STAGE_NAMES:
            why = (
                "names two stages"
                if name in earlier
                else f"is reserved: the run's folder has a folder {name}/ of its own"
            )
            yield f"stages.{name}.name: {why}; choose another name"
        if ("steps" in stage) == ("tokens" in stage):
            found = "both" if "steps" in stage else "neither"
            yield f"stages.{name}: must have exactly one of steps and tokens, got {found}"
        if isinstance(stage.get("dataset"), list):
            example = "{ pile = 0.5, slimpajama = 0.5 }"
            yield f"stages.{name}.dataset: must be a name or a table of weights such as {example}, got a list"
        yield from _dataset_faults(f"stages.{name}.dataset", stage.get("dataset"), datasets)
        replay = stage.get("replay")
        if isinstance(replay, dict):
            yield from _dataset_faults(f"stages.{name}.replay.from", replay.get("from"), datasets)
        yield from _init_faults(stage, name, earlier)
        earlier.append(name)
    tokenizer = raw.get("tokenizer")
    train = tokenizer.get("train") if isinstance(tokenizer, dict) else None
    if isinstance(train, dict):
        yield from _tokenizer_training_faults(train, datasets)


def _dataset_faults(where: str, mix: Any, datasets: dict[str, dict[str, Any]]) -> Iterator[str]:
    known = list(datasets)
    for name in _named(mix):
        if name not in datasets:
            yield f"{where}: there is no [datasets.{name}]{did_you_mean(name, known)}; there are {quoted_list(known)}"
        elif not (datasets[name].get("train") or datasets[name].get("domains")):
            yield f"{where}: [datasets.{name}] has no tokens to train on: give it train or domains"


def _init_faults(stage: dict[str, Any], name: str, earlier: list[str]) -> Iterator[str]:
    init = stage.get("init", "previous" if earlier else "random")
    where = f"stages.{name}.init"
    if not isinstance(init, str):
        return  # its type is told already
    kind, _, target = init.partition(":")
    if init == "previous" and not earlier:
        yield f"{where}: nothing comes before the first stage; allowed are random, checkpoint:PATH and hf:NAME"
    elif kind == "stage":
        base, _, point = target.partition("@")
        if base not in earlier or point not in ("", "pre_anneal"):
            forms = "stage:NAME or stage:NAME@pre_anneal"
            yield f"{where}: must name an earlier stage as {forms}, got {init!r}; earlier are {quoted_list(earlier)}"
    elif init not in ("previous", "random") and not (kind in ("checkpoint", "hf") and target):
        allowed = "previous, random, stage:NAME, stage:NAME@pre_anneal, checkpoint:PATH, hf:PATH-OR-NAME"
        yield f"{where}: must be one of {allowed}, got {init!r}"
    if stage.get("optimizer_state") == "keep" and (init == "random" or kind == "hf"):
        yield f"stages.{name}.optimizer_state: there is none to keep where init is {init!r}; allowed is reset"


def _tokenizer_training_faults(train: dict[str, Any], datasets: dict[str, dict[str, Any]]) -> Iterator[str]:
    name = train.get("dataset")
    if not isinstance(name, str):
        return
    yield from _dataset_faults("tokenizer.train.dataset", name, datasets)
    if name in datasets and "source" not in datasets[name]:
        yield f"tokenizer.train.dataset: [datasets.{name}] has no source, so there is no text to train a tokenizer on"
