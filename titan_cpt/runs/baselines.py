"""The comparison runs of a config, derived from it alone: what the paper holds continual pre-training against.

Each differs from the config in the one thing that its name says, and has its compute: the union the sum of all stages,
every other run the steps of the stages that it keeps. Source: Ibrahim et al. 2024, sections 5 and 6.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from titan_cpt.common.files import make_folder, write_text_atomically
from titan_cpt.common.reading import read_text
from titan_cpt.config.load import check_config, dump_config, load_config
from titan_cpt.config.schema import Config
from titan_cpt.errors import ConfigError, TitanError
from titan_cpt.planning.plan import Plan, StageCheckpoint, StagePlan

_Tables = dict[str, Any]
_SEAL = "# SHA-256 of what follows: "


@dataclass(frozen=True)
class Baseline:
    """One comparison run: its name, what it differs in, and its config."""

    name: str
    what: str
    config: Config


def write_baselines(config: Config, plan: Plan, folder: Path | None, say: Callable[[str], None] = print) -> list[Path]:
    """Write the config itself, resolved, and a TOML for every comparison run that it allows; says what each is.

    Args:
        folder: where they go; None for `<output_dir>/<job.name>-baselines/configs`.

    Raises:
        ConfigError: there is nothing to compare with (the config has one stage that begins at random weights), or a
            file would be replaced that this command did not write for this job.
    """
    found = list(derive_baselines(config, plan))
    if not found:
        raise ConfigError(
            f"{config.job.name}: one stage from random weights has no baselines; there must be a stage that goes on"
        )
    folder = folder or _runs_folder(config) / "configs"
    texts, whats = dict[Path, str](), dict[Path, str]()
    for baseline in [Baseline("configured", "the run that the others are compared with", config), *found]:
        about = f"# {config.job.name}, {baseline.what}; derived from its config by `titan-cpt baselines`.\n"
        path = folder / f"{baseline.name}.toml"
        whats[path] = baseline.what
        texts[path] = _sealed(about, dump_config(baseline.config))
    _require_own(texts, config.job.name)
    make_folder(folder)
    for path, text in texts.items():
        write_text_atomically(path, text)
        say(f"{path}: {whats[path]}")
    return list(texts)


def _sealed(about: str, tables: str) -> str:
    """A TOML that says what it is and holds its own checksum, so that one that was edited is recognized."""
    return f"{about}{_SEAL}{hashlib.sha256(tables.encode()).hexdigest()[:32]}\n\n{tables}"


def _is_same_config(path: Path, there: str, text: str) -> bool:
    """Whether a file of a version without checksums, which may lack newer keys, means what would be written now."""
    tables = text.partition("\n\n")[2]
    if there.partition("\n\n")[2] == tables:
        return True
    if _SEAL in there or "\n#" in there:
        return False  # a comment is someone's own
    try:
        return dump_config(load_config(path)) == tables
    except TitanError:
        return False


def _require_own(texts: Mapping[Path, str], job_name: str) -> None:
    """Refuse to replace a file that `titan-cpt baselines` did not write for this job, or that was edited since.

    Raises:
        ConfigError: names every such file.
    """
    foreign = []
    for path, text in texts.items():
        try:
            there = read_text(path)
        except FileNotFoundError:
            continue
        except ValueError:
            if not os.path.lexists(path):
                continue  # a name that cannot exist, such as one too long: writing it says why
            there = ""
        about, _, rest = there.partition("\n")
        seal, _, tables = rest.partition("\n\n")
        ours = about.startswith(f"# {job_name}, ") and seal.startswith(_SEAL) and there == _sealed(f"{about}\n", tables)
        if not ours and not _is_same_config(path, there, text):
            foreign.append(path)
    if foreign:
        raise ConfigError(
            f"{', '.join(map(str, foreign))}: {'is' if len(foreign) == 1 else 'are'} not what `titan-cpt baselines` "
            f"wrote for {job_name}, or edited since. Nothing was changed: rename or remove what is there, or give "
            "another --output"
        )


def derive_baselines(config: Config, plan: Plan) -> Iterator[Baseline]:
    """Every comparison run that makes sense for the config, each once."""
    tables: _Tables = config.model_dump(mode="json", by_alias=True, exclude_none=True)
    tables["job"]["output_dir"] = str(_runs_folder(config))
    for name, what, stages, datasets in _runs(tables, plan):
        raw = copy.deepcopy(tables)
        raw["job"]["name"] = name
        raw["stages"], raw["datasets"] = stages, {**raw["datasets"], **datasets}
        yield Baseline(name, what, check_config(raw, Path(f"{name} of {config.job.name}")))


def _runs_folder(config: Config) -> Path:
    return Path(config.job.output_dir) / f"{config.job.name}-baselines"


def _runs(tables: _Tables, plan: Plan) -> Iterator[tuple[str, str, list[_Tables], _Tables]]:
    """(name, what, stages, further datasets) of each run."""
    stages: list[_Tables] = tables["stages"]
    later = [index for index, stage in enumerate(plan.stages) if stage.init != "random"]
    if not later:
        return
    if plan.stages[0].init == "random":  # else nobody knows what the first weights were trained on
        yield "union", "one model from scratch on all its data, for the sum of all steps", [_union(tables, plan)], {}
        for index, stage in enumerate(plan.stages):
            what = f"the data of stage {stage.name!r} alone, from scratch"
            yield f"alone-{stage.name}", what, [_alone(tables, plan, index)], {}
    if any(stage.get("replay", {}).get("fraction") for stage in stages):
        without = [{key: value for key, value in stage.items() if key != "replay"} for stage in stages]
        yield "no-replay", "without replay", without, {}
    for name, what, lr in (
        ("constant-min", "staying at the LR that the stage before ended with", _lr_to_stay_at),
        ("constant-max", "re-warmed to the stage's peak LR, and no decay", _lr_to_go_up_to),
    ):
        changed = [
            {**stage, "lr": lr(plan, index, stage["lr"])} if index in later else stage
            for index, stage in enumerate(stages)
        ]
        yield name, what, changed, {}
    sequences, datasets = _domain_after_domain(tables, plan, later)
    if datasets:
        yield "domain-after-domain", "domains one after another instead of mixed", sequences, datasets


def _union(tables: _Tables, plan: Plan) -> _Tables:
    """Weights are the steps in which a dataset is new: its tokens, were nothing replayed."""
    weights: dict[str, float] = {}
    for stage, planned in zip(tables["stages"], plan.stages, strict=True):
        mix = stage["dataset"] if isinstance(stage["dataset"], dict) else {stage["dataset"]: 1.0}
        for name, weight in mix.items():
            weights[name] = weights.get(name, 0.0) + planned.steps * weight / sum(mix.values())
    steps = sum(stage.steps for stage in plan.stages)
    dataset = weights if len(weights) > 1 else next(iter(weights))
    return {**_from_scratch(tables["stages"][0]), "name": "union", "dataset": dataset, "steps": steps}


def _alone(tables: _Tables, plan: Plan, index: int) -> _Tables:
    """The first stage's schedule, which is one for random weights, over this stage's data and steps."""
    stage = tables["stages"][index]
    if index == 0:
        return dict(stage)
    return {
        **_from_scratch(tables["stages"][0]),
        "name": stage["name"],
        "dataset": stage["dataset"],
        "steps": plan.stages[index].steps,
    }


def _from_scratch(first: _Tables) -> _Tables:
    return {key: value for key, value in first.items() if key not in ("tokens", "steps", "replay")}


def _lr_to_stay_at(plan: Plan, index: int, _lr: _Tables) -> _Tables:
    return {"schedule": "constant", "max": _lr_before(plan, plan.stages[index])}


def _lr_before(plan: Plan, stage: StagePlan) -> float:
    """The LR at which the stage's weights were left; its own last one where they come from elsewhere."""
    if isinstance(stage.init, StageCheckpoint):
        return plan.stage(stage.init.stage).lr_at(max(stage.init.steps_done - 1, 0))
    return stage.lr_at(stage.steps - 1)


def _lr_to_go_up_to(plan: Plan, index: int, lr: _Tables) -> _Tables:
    peak = lr["constant"] if lr.get("max") is None else lr["max"]
    return {"schedule": "constant", "max": peak, "warmup_until": lr.get("warmup_until", 0.01)}


def _domain_after_domain(tables: _Tables, plan: Plan, later: list[int]) -> tuple[list[_Tables], _Tables]:
    """Stages, and the domains as datasets of their own; the dataset stays, to be measured on and not trained on."""
    stages: list[_Tables] = []
    datasets: _Tables = {}
    for index, stage in enumerate(tables["stages"]):
        name = stage["dataset"]
        domains = tables["datasets"][name].get("domains") if isinstance(name, str) else None
        if not domains or index not in later:
            stages.append(stage)
            continue
        total, done = sum(domain["weight"] for domain in domains.values()), 0.0
        ends = [0]
        for domain in domains.values():
            done += domain["weight"]
            ends.append(round(plan.stages[index].steps * done / total))
        for (domain, table), (begin, end) in zip(domains.items(), pairwise(ends), strict=True):
            if end == begin:
                raise ConfigError(f"datasets.{name}.domains.{domain}: its weight comes to less than a step of its own")
            datasets[f"{name}-{domain}"] = {key: value for key, value in table.items() if key != "weight"}
            own = {key: value for key, value in stage.items() if key not in ("tokens", "init")}
            stages.append({**own, "name": f"{stage['name']}-{domain}", "dataset": f"{name}-{domain}"})
            stages[-1]["steps"] = end - begin
            if begin == 0 and "init" in stage:
                stages[-1]["init"] = stage["init"]
    return stages, datasets
