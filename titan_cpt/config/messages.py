"""What is wrong with a config, in words: pydantic's errors and broken references."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from titan_cpt.common.text import listed, nearest
from titan_cpt.config.schema import Config

# The run's folder holds these folders beside those of the stages.
RESERVED_STAGE_NAMES = ("tb", "evaluations", "profile", "report", "logs")


def in_words(error: Any, raw: dict[str, Any]) -> str:
    """One of pydantic's errors as `dotted.key: what is allowed, got what`."""
    where = _dotted(error["loc"], raw)
    got, context, last = _shown(error["input"]), error.get("ctx", {}), str(error["loc"][-1])
    match error["type"]:
        case "titan":
            return f"{where}: " + str(context["message"])
        case "missing":
            return f"{where}: is missing{_about(error['loc'])}"
        case "extra_forbidden":
            known = sorted({key for model in models_at(error["loc"][:-1]) for key in _keys(model)})
            hint = _of_a_stage(error["loc"]) or nearest(last, known) or "; allowed here are " + listed(known)
            return f"{where}: unknown key{hint}"
        case "union_tag_invalid" | "literal_error":
            allowed = context.get("expected_tags") or context.get("expected")
            choices = [word.strip("' ") for word in str(allowed).replace(" or ", ", ").split(",")]
            key = f"{where}.schedule" if error["type"] == "union_tag_invalid" else where
            found = context.get("tag", error["input"])
            return f"{key}: must be one of {listed(choices)}, got {_shown(found)}{nearest(str(found), choices)}"
        case "union_tag_not_found":
            return f'{where}.schedule: is missing; give a schedule such as "cosine"'
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{where}: must be a table, got {got}"
        case "tuple_type":
            return f"{where}: must be a list, got {got}"
        case "too_short":
            return f"{where}: must hold at least one entry"
    bounds = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    if error["type"] in bounds:
        return f"{where}: must be {_range(error['loc'])}, got {got}"
    kinds = {"int": "an integer", "float": "a number", "bool": "true or false", "string": "a string"}
    kind = kinds.get(error["type"].split("_")[0])
    return f"{where}: must be {kind}, got {got}" if kind else f"{where}: {error['msg']}, got {got}"


_OF_A_STAGE = ("steps", "tokens", "lr", "lr_scheduler", "warmup_steps", "warmup", "init", "replay")


def _of_a_stage(location: Sequence[Any]) -> str:
    """Where steps, budget and learning rate are set, for those who look for them in [training] or [optimizer]."""
    if str(location[0]) not in ("training", "optimizer", "lr_scheduler") or str(location[-1]) not in _OF_A_STAGE:
        return ""
    return "; each of the [[stages]] has its own steps or tokens, lr (with its warm-up), init and replay"


def _dotted(location: Sequence[Any], raw: Any) -> str:
    """The location as a user would write it: stages by name, no tags of the schema's unions."""
    parts: list[str] = []
    for place, part in enumerate(location):
        if isinstance(raw, list) and isinstance(part, int):
            raw = raw[part] if part < len(raw) else None
            parts.append(_stage_name(raw["name"]) if isinstance(raw, dict) and "name" in raw else f"[{part}]")
        elif isinstance(raw, dict) and part in raw:
            raw = raw[part]
            parts.append(str(part))
        elif (
            place == len(location) - 1
            and part != "[key]"
            and not (isinstance(raw, dict) and raw.get("schedule") == part)
        ):
            parts.append(str(part))
    return ".".join(parts)


def _stage_name(name: Any) -> str:
    """In quotes where it is no name, so that it can be told from the dots around it."""
    return name if isinstance(name, str) and re.fullmatch(r"[\w/-]+", name) else repr(name)


def models_at(location: Sequence[Any]) -> list[type[BaseModel]]:
    """The schema's tables that may stand at a location (several where it is a union)."""
    models: list[type[BaseModel]] = [Config]
    named = False
    for part in location:
        if named:  # part is which of the datasets, domains or stages
            named = False
            continue
        annotations = [_field(model, part).annotation for model in models if part in _keys(model)]
        named = any(typing.get_origin(annotation) in (dict, tuple) for annotation in annotations)
        stepped = [inner for annotation in annotations for inner in _inner(annotation)]
        tagged = [m for m in models if "schedule" in m.model_fields and part in typing.get_args(_annotation(m))]
        models = stepped or tagged or models
    return models


def _annotation(model: type[BaseModel]) -> Any:
    return model.model_fields["schedule"].annotation


def _keys(model: type[BaseModel]) -> dict[str, str]:
    return {field.alias or name: name for name, field in model.model_fields.items()}


def _field(model: type[BaseModel], key: str) -> Any:
    return model.model_fields[_keys(model)[key]]


def is_string(model: type[BaseModel], key: str) -> bool:
    """Whether the key takes text and nothing else."""
    if key not in _keys(model):
        return False
    annotation = _field(model, key).annotation
    members = [kind for kind in typing.get_args(annotation) or (annotation,) if kind is not type(None)]
    return members == [str]


def _inner(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _inner(argument)]


def _about(location: Sequence[Any]) -> str:
    for model in models_at(location[:-1]):
        if location[-1] in _keys(model) and (about := _field(model, str(location[-1])).description):
            return ": " + str(about).split("\n")[0].rstrip(".")
    return ""


def _range(location: Sequence[Any]) -> str:
    """The bounds of a key as an interval, such as [0, 1) or > 0."""
    bounds: dict[str, Any] = {}
    for model in models_at(location[:-1]):
        if location[-1] in _keys(model):
            field = _field(model, str(location[-1]))
            for part in [*field.metadata, *(m for a in typing.get_args(field.annotation) for m in _metadata(a))]:
                for name in ("gt", "ge", "lt", "le"):
                    value = getattr(part, name, None)
                    bounds |= {} if value is None else {name: value}
    low = f"({bounds['gt']:g}" if "gt" in bounds else f"[{bounds['ge']:g}" if "ge" in bounds else ""
    high = f"{bounds['lt']:g})" if "lt" in bounds else f"{bounds['le']:g}]" if "le" in bounds else ""
    if low and high:
        return f"in {low}, {high}"
    only = next(iter(bounds.items()), ("ge", 0))
    return f"{ {'gt': '>', 'ge': '>=', 'lt': '<', 'le': '<='}[only[0]] } {only[1]:g}"


def _metadata(annotation: Any) -> list[Any]:
    found: list[Any] = []
    for part in getattr(annotation, "__metadata__", ()):
        found += getattr(part, "metadata", [part])
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


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
            yield f"{where}: there is no [datasets.{name}]{nearest(name, known)}; there are {listed(known)}"
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
            yield f"{where}: must name an earlier stage as {forms}, got {init!r}; earlier are {listed(earlier)}"
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
