"""Baseline runs to compare a config with, derived from the config: joint training, no replay, constant LR, and more.

Each baseline changes one thing, which its name states, and has the same compute: the union trains for the sum of all
stages, every other baseline for the steps of the stages that it keeps. Source: Ibrahim et al. 2024, arXiv:2403.08763,
sections 5 and 6.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from titan_cpt.common.files import make_folder, write_text_atomically
from titan_cpt.common.reading import read_text
from titan_cpt.config.load import check_config, dump_config, load_config
from titan_cpt.config.schema import Config
from titan_cpt.errors import ConfigError, TitanError
from titan_cpt.models.spec import ROPE_SCALINGS
from titan_cpt.planning.plan import Plan, StageCheckpoint, StagePlan

_Tables = dict[str, Any]
_OF_THE_DATA = ("seq_len", "global_batch_size", "local_batch_size", "document_mask", "document_positions")
_OF_INITIAL_WEIGHTS = ("init", "new_rows", "weak_rows")  # keys of what a stage does once, when it begins
_CONTINUED: _Tables = {"lr": {"schedule": "continue"}, "optimizer_state": "keep"}
_CHECKSUM = "# SHA-256 of what follows: "


@dataclass(frozen=True)
class Baseline:
    """One baseline run: its name, a description of what it changes, and its config."""

    name: str
    description: str
    config: Config


def write_baselines(
    config: Config,
    plan: Plan,
    folder: Path | None,
    log: Callable[[str], None] = print,
    *,
    dry_run: bool = False,
) -> list[Path]:
    """Write the resolved config and one TOML for each of its baselines, and log a line for each; returns their paths.

    Args:
        folder: folder to write to; None for `<output_dir>/<job.name>-baselines/configs`.
        dry_run: check and log, and write nothing.

    Raises:
        ConfigError: there is no baseline (the config has a single stage, from random weights), or a file exists that
            this command did not write for this job.
    """
    found = list(derive_baselines(config, plan))
    if not found:
        raise ConfigError(
            f"{config.job.name}: a single stage from random weights has no baselines; add a stage that continues it"
        )
    folder = folder or _runs_folder(config) / "configs"
    texts = dict[Path, str]()
    descriptions = dict[Path, str]()
    for baseline in [Baseline("configured", "the run that the others are compared with", config), *found]:
        header = f"# {config.job.name}, {baseline.description}; derived from its config by `titan-cpt baselines`.\n"
        path = folder / f"{baseline.name}.toml"
        descriptions[path] = baseline.description
        texts[path] = _with_checksum(header, dump_config(baseline.config))
    _require_own(texts, config.job.name)
    if not dry_run:
        make_folder(folder)
    for path, text in texts.items():
        if not dry_run:
            write_text_atomically(path, text)
        log(f"{path}: {descriptions[path]}")
    return list(texts)


def _with_checksum(header: str, tables: str) -> str:
    """The TOML with a checksum of its tables in the header; an edited file no longer matches it."""
    return f"{header}{_CHECKSUM}{hashlib.sha256(tables.encode()).hexdigest()[:32]}\n\n{tables}"


def _is_same_config(path: Path, found: str, text: str) -> bool:
    """Whether a file without a checksum, from an older version that had fewer keys, is the config to be written.

    Args:
        found: the file's content.
        text: the content to be written.
    """
    tables = text.partition("\n\n")[2]
    if found.partition("\n\n")[2] == tables:
        return True
    if _CHECKSUM in found or "\n#" in found:
        return False  # a comment: somebody edited it
    try:
        return dump_config(load_config(path)) == tables
    except TitanError:
        return False


def _require_own(texts: Mapping[Path, str], job_name: str) -> None:
    """Check that every file to be written is absent, or was written by `titan-cpt baselines` for this job.

    Raises:
        ConfigError: with the names of other files, and of those that were edited.
    """
    foreign = []
    for path, text in texts.items():
        try:
            found = read_text(path)
        except FileNotFoundError:
            continue
        except ValueError:
            if not os.path.lexists(path):
                continue  # an impossible file name, such as one too long: the error comes when it is written
            found = ""
        header, _, rest = found.partition("\n")
        checksum, _, tables = rest.partition("\n\n")
        is_ours = (
            header.startswith(f"# {job_name}, ")
            and checksum.startswith(_CHECKSUM)
            and found == _with_checksum(f"{header}\n", tables)
        )
        if not is_ours and not _is_same_config(path, found, text):
            foreign.append(path)
    if foreign:
        raise ConfigError(
            f"{', '.join(map(str, foreign))}: {'is' if len(foreign) == 1 else 'are'} not what `titan-cpt baselines` "
            f"wrote for {job_name}, or edited since. Nothing was changed: rename or remove "
            f"{'that file' if len(foreign) == 1 else 'those files'}, or choose another --output"
        )


def derive_baselines(config: Config, plan: Plan) -> Iterator[Baseline]:
    """The baselines of a config; none if it is a single stage from random weights."""
    tables: _Tables = config.model_dump(mode="json", by_alias=True, exclude_none=True)
    tables["job"]["output_dir"] = str(_runs_folder(config))
    tables = {**tables, "stages": [_with_weights(*each) for each in zip(tables["stages"], plan.stages, strict=True)]}
    for name, description, stages, datasets in _runs(tables, plan):
        raw = copy.deepcopy(tables)
        raw["job"]["name"] = name
        raw["stages"] = stages
        raw["datasets"] |= datasets
        yield Baseline(name, description, check_config(raw, Path(f"{name} of {config.job.name}")))


def _runs_folder(config: Config) -> Path:
    return Path(config.job.output_dir) / f"{config.job.name}-baselines"


def _runs(tables: _Tables, plan: Plan) -> Iterator[tuple[str, str, list[_Tables], _Tables]]:
    """(name, description, [[stages]] tables, additional [datasets] tables) of each baseline."""
    stages: list[_Tables] = tables["stages"]
    later = [index for index, stage in enumerate(plan.stages) if stage.init != "random"]
    if not later:
        return
    if plan.stages[0].init == "random":  # the data of released weights is not known
        yield (
            "union",
            "joint training on all data from scratch, for the sum of all steps",
            [_union(tables, plan)],
            {},
        )
        for index, stage in enumerate(plan.stages):
            description = f"only the data of stage {stage.name!r}, from scratch"
            yield f"alone-{stage.name}", description, [_only_stage(tables, plan, index)], {}
    if any(stage.get("replay", {}).get("fraction") for stage in stages):
        without = [{key: value for key, value in stage.items() if key != "replay"} for stage in stages]
        yield "no-replay", "without replay", without, {}
    for name, description, lr in (
        ("constant-min", "constant LR, at the last value of the stage before", _constant_min),
        ("constant-max", "re-warmed to the stage's peak LR, then constant", _constant_max),
    ):
        own = [index for index in later if not plan.stages[index].schedule_offset]  # with a schedule of its own
        changed = [
            {**stage, "lr": lr(plan, index, stage["lr"])} if index in own else stage
            for index, stage in enumerate(stages)
        ]
        if own:
            yield name, description, changed, {}
    sequences, datasets = _domain_after_domain(tables, plan, later)
    if datasets:
        yield "domain-after-domain", "domains one after another instead of mixed", sequences, datasets


def _with_weights(stage: _Tables, planned: StagePlan) -> _Tables:
    """The stage with the weights of the plan in the place of a mixture by tokens: baselines have the same ones."""
    if not (isinstance(stage["dataset"], dict) and isinstance(stage["dataset"].get("of"), list)):
        return stage
    return {**stage, "dataset": {name: float(Fraction(text)) for name, text in planned.recipe["dataset"].items()}}


def _union(tables: _Tables, plan: Plan) -> _Tables:
    """One stage on all datasets, each weighted by the steps in which it is new (its tokens, if nothing is replayed).

    If steps have different numbers of tokens, tokens count in the place of steps.
    """
    sizes = {phase.size * stage.seq_len for stage in plan.stages for phase in stage.batch_sizes.within(stage.steps)}
    by_steps = len(sizes) == 1
    weights: dict[str, float] = {}
    for stage, planned in zip(tables["stages"], plan.stages, strict=True):
        mix = stage["dataset"] if isinstance(stage["dataset"], dict) else {stage["dataset"]: 1.0}
        for name, weight in mix.items():
            amount = planned.steps if by_steps else planned.tokens
            weights[name] = weights.get(name, 0.0) + amount * weight / sum(mix.values())
    steps = sum(stage.steps for stage in plan.stages)
    budget = {"steps": steps} if by_steps else {"tokens": sum(stage.tokens for stage in plan.stages)}
    dataset = weights if len(weights) > 1 else next(iter(weights))
    return {**_from_scratch(tables["stages"][0]), "name": "union", "dataset": dataset, **budget}


def _only_stage(tables: _Tables, plan: Plan, index: int) -> _Tables:
    """This stage's data and steps from random weights, with the first stage's schedule, which is meant for them."""
    stage = tables["stages"][index]
    first = {**_everything_trained(tables["stages"][0]), "lr": _scaled_schedule(tables["stages"][0]["lr"], plan)}
    if index == 0:
        return first
    own = {key: value for key, value in _from_scratch(first).items() if key not in _OF_THE_DATA}
    return {
        **own,
        **{key: stage[key] for key in _OF_THE_DATA if key in stage},
        **_own_rope(plan, plan.stages[index]),
        "name": stage["name"],
        "dataset": stage["dataset"],
        "steps": plan.stages[index].steps,
        **_within(first, plan.stages[index].steps),
    }


def _within(stage: _Tables, steps: int) -> _Tables:
    """The keys that count a stage's steps, where these may be fewer; empty if the stage has none of them.

    The optimizer state is warmed up on no more batches than there are, and Reptile pulls at the end at the latest.
    """
    keys: _Tables = {}
    kind, _, passes = stage.get("optimizer_state", "").partition(":")
    if kind == "warm":
        keys["optimizer_state"] = f"warm:{min(int(passes), steps)}"
    if reptile := stage.get("reptile"):
        keys["reptile"] = {**reptile, "every": min(reptile["every"], steps)}
    return keys


def _own_rope(plan: Plan, stage: StagePlan) -> _Tables:
    """The key `rope` with which random weights get the RoPE of a stage, which it may have from an earlier one."""
    rope, model = stage.spec.rope, plan.spec.rope
    changed: _Tables = {} if rope.base == model.base else {"base": rope.base}
    if rope.scaling is None and model.scaling is not None:
        changed["kind"] = "none"
    elif rope.scaling is not None and rope.scaling != model.scaling:
        names = ("kind", "factor", "original_seq_len", *ROPE_SCALINGS[rope.scaling.kind])
        numbers = {name: getattr(rope.scaling, name) for name in names}
        changed |= {name: number for name, number in numbers.items() if number is not None}
    return {"rope": changed} if changed else {}


def _scaled_schedule(lr: _Tables, plan: Plan) -> _Tables:
    """The first stage's LR table; if it spans later stages too, with end points as shares, which fit one stage."""
    spanned = plan.schedule_span(plan.stages[0])
    steps = sum(stage.steps for stage in spanned)
    points = [key for key in ("warmup_until", "cooldown_until", "constant_until", "decay_from") if key in lr]
    shares = {key: float(Fraction(plan.stages[0].recipe[f"lr.{key}"]) / steps) for key in points}
    return lr | shares if len(spanned) > 1 else lr


def _from_scratch(first: _Tables) -> _Tables:
    return {key: value for key, value in _everything_trained(first).items() if key not in ("tokens", "steps", "replay")}


def _everything_trained(stage: _Tables) -> _Tables:
    """A stage from random weights without `trainable`, and without `lr_scale` where that is of the trained parts."""
    if "trainable" not in stage:
        return stage
    return {key: value for key, value in stage.items() if key not in ("trainable", "lr_scale")}


def _constant_min(plan: Plan, index: int, _lr: _Tables) -> _Tables:
    return {"schedule": "constant", "max": _lr_before(plan, plan.stages[index])}


def _lr_before(plan: Plan, stage: StagePlan) -> float:
    """The last LR of the step before the stage; the stage's own last LR if its weights were not trained in this run."""
    if isinstance(stage.init, StageCheckpoint):
        return plan.stage(stage.init.stage).lr_at(max(stage.init.steps_done - 1, 0))
    return stage.lr_at(stage.steps - 1)


def _constant_max(plan: Plan, index: int, lr: _Tables) -> _Tables:
    peak = lr["constant"] if lr.get("max") is None else lr["max"]
    return {"schedule": "constant", "max": peak, "warmup_until": lr.get("warmup_until", 0.01)}


def _domain_after_domain(tables: _Tables, plan: Plan, later: list[int]) -> tuple[list[_Tables], _Tables]:
    """[[stages]] that train one domain after another, and the [datasets] of these domains.

    The dataset with all its domains stays in the config for validation.
    """
    stages: list[_Tables] = []
    datasets: _Tables = {}
    last_parts: dict[str, str] = {}  # of a stage whose domains are stages: the name of the last one
    for index, configured in enumerate(tables["stages"]):
        stage = configured | _renamed_init(configured, last_parts)
        name = stage["dataset"]
        domains = tables["datasets"][name].get("domains") if isinstance(name, str) else None
        if not domains or index not in later:
            stages.append(stage)
            continue
        total = sum(domain["weight"] for domain in domains.values())
        done = 0.0
        ends = [0]
        for domain in domains.values():
            done += domain["weight"]
            ends.append(round(plan.stages[index].steps * done / total))
        for (domain, table), (begin, end) in zip(domains.items(), pairwise(ends), strict=True):
            if end == begin:
                raise ConfigError(
                    f"datasets.{name}.domains.{domain}: its weight gives less than one step: raise the weight or the "
                    "stage's steps"
                )
            datasets[f"{name}-{domain}"] = {key: value for key, value in table.items() if key != "weight"}
            own = {key: value for key, value in stage.items() if key not in ("tokens", *_OF_INITIAL_WEIGHTS)}
            stages.append({**own, "name": f"{stage['name']}-{domain}", "dataset": f"{name}-{domain}"})
            stages[-1] |= {"steps": end - begin, **_part_of_ramp(plan.stages[index], begin, end)}
            stages[-1] |= _within(stage, end - begin)
            if begin == 0:
                stages[-1] |= {key: stage[key] for key in _OF_INITIAL_WEIGHTS if key in stage}
            if begin and len(plan.schedule_span(plan.stages[index])) > 1:
                stages[-1] |= _CONTINUED
        last_parts[stage["name"]] = stages[-1]["name"]
    return stages, datasets


def _renamed_init(stage: _Tables, last_parts: Mapping[str, str]) -> _Tables:
    """The key `init` of a stage that starts from a stage whose domains are stages: from the last one of these."""
    kind, _, reference = str(stage.get("init", "")).partition(":")
    name, at, point = reference.partition("@")
    return {"init": f"stage:{last_parts[name]}{at}{point}"} if kind == "stage" and name in last_parts else {}


def _part_of_ramp(stage: StagePlan, begin: int, end: int) -> _Tables:
    """The batch-size ramp of the steps from `begin` to `end` of a stage, as a key; empty if the stage has no ramp."""
    sizes = stage.batch_sizes
    if len(sizes.phases) == 1:
        return {}
    before = sizes.sequences_before(begin)
    later = [phase for phase in sizes.phases if begin < phase.first_step < end]
    ramp = {str((phase.first_sequence - before) * stage.seq_len): phase.size for phase in later}
    return {"global_batch_size": {"0": sizes.at(begin), **ramp}}
