"""The configs that `titan-cpt init` writes: a commented TOML for each scenario, from the templates in scenario_files/.

A template is a TOML file with ${placeholders}. Values that a user gives are written as TOML strings, and the result is
checked before it is written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from titan_cpt.common.files import write_text_atomically
from titan_cpt.common.text import did_you_mean
from titan_cpt.config.load import check_config, load_config
from titan_cpt.config.lr import ContinueLR
from titan_cpt.config.schema import Config
from titan_cpt.config.toml_files import read_with_bases
from titan_cpt.errors import ConfigError
from titan_cpt.models.registry import SIZES
from titan_cpt.models.releases import release_of_hub_name

_TEMPLATES = Path(__file__).with_name("scenario_files")
_COMMENT = re.compile(r"^(?P<code>.*?\S)(?P<gap> +)(?P<comment># .*)$")  # behind code; no template has "# " in a string
_INFINITE = """\
optimizer_state = "keep"                           # the learning rate stays constant, so Adam's moments are kept too
[stages.lr]
schedule       = "{schedule}"
constant       = {lr:g}
warmup_until   = 0                                 # nothing is re-warmed
cooldown_until = 0
constant_until = 0.8                               # then annealing; the next stage starts before it
"""
_REWARMED = """\
# Re-warmed to the peak of the stage before; a lower peak learns less of the new data and forgets less of the old.
lr      = {{ schedule = "cosine", max = {lr:g}, warmup_until = 0.01 }}
"""


@dataclass(frozen=True)
class Scenario:
    """A config that `init` can write.

    Attributes:
        summary: what it is for, in a line.
        texts: default text files by dataset, in the order of training.
        options: names of the options of `ScenarioOptions` that it takes, besides name and text.
    """

    summary: str
    texts: Mapping[str, str]
    options: tuple[str, ...] = ()


_ENGLISH = {"english": "text/english/*.jsonl"}
_GERMAN = {"german": "text/german/*.jsonl"}
SCENARIOS: Mapping[str, Scenario] = {
    "laptop": Scenario(
        "from scratch on a laptop: one language, then a second with replay of the first",
        _ENGLISH | _GERMAN,
        ("size", "steps"),
    ),
    "released": Scenario(
        "continue a released model of the Hugging Face hub on new text", _ENGLISH | _GERMAN, ("model", "size", "steps")
    ),
    "new-data": Scenario("add new data to a run that exists", {"news": "text/news/*.jsonl"}, ("base",)),
    "infinite": Scenario(
        "a learning rate without a fixed end, and a branch that anneals it", _ENGLISH | _GERMAN, ("size", "steps")
    ),
    "sweep": Scenario("compare replay fractions and learning rates in six runs", _ENGLISH | _GERMAN, ("size", "steps")),
    "cluster": Scenario(
        "a 410M model on two nodes of eight GPUs under Slurm",
        {"english": "text/english/*.jsonl.zst", "german": "text/german/*.jsonl.zst"},
        ("size",),
    ),
}
_SIZES = {"cluster": "410m"}
_ORDER = [*("debug", "tiny", "mini"), *(size for sizes in SIZES.values() for size in sizes)]


@dataclass(frozen=True)
class ScenarioOptions:
    """What a user may choose; None for the scenario's own value.

    Attributes:
        name: name of the run.
        texts: `FILES` or `NAME=FILES` for the scenario's datasets, in their order; NAME renames the dataset.
        size: named size of the model.
        steps: steps of each stage.
        model: name of a model on the Hugging Face hub, or its folder.
        base: the config of the run that new data is added to.
    """

    name: str | None = None
    texts: Sequence[str] = ()
    size: str | None = None
    steps: int | None = None
    model: str | None = None
    base: Path | None = None


def write_scenario(scenario: str, path: Path, options: ScenarioOptions, *, force: bool = False) -> Config:
    """Write a scenario's TOML file and return its config.

    Args:
        force: replace a file that exists.

    Raises:
        ConfigError: the scenario is unknown, the file exists, an option does not belong to the scenario, or an option
            makes the config invalid. Nothing is written then.
        OSError: the file cannot be written.
    """
    if scenario not in SCENARIOS:
        known = ", ".join(SCENARIOS)
        raise ConfigError(
            f"command line: unknown scenario {scenario!r}{did_you_mean(scenario, SCENARIOS) or ';'} known are {known}"
        )
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder. Give the path of the file to write, such as {path / scenario}.toml")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: {path.parent} is not a folder that exists; make it, or give another path")
    if os.path.lexists(path) and not force:
        raise ConfigError(f"{path}: exists already and was not changed; give another name, or --force to replace it")
    text = scenario_text(scenario, path, options)
    config = _checked(text, path)
    write_text_atomically(path, text)
    return config


def scenario_text(scenario: str, path: Path, options: ScenarioOptions) -> str:
    """The TOML text of a scenario.

    Args:
        path: where it will be written; its comments name it, and `extends` is relative to its folder.

    Raises:
        ConfigError: an option does not belong to the scenario.
    """
    chosen = SCENARIOS[scenario]
    for option in ("size", "steps", "model", "base"):
        if getattr(options, option) is not None and option not in chosen.options:
            able = ", ".join(name for name, each in SCENARIOS.items() if option in each.options)
            raise ConfigError(f"command line: --{option} is not an option of the scenario {scenario!r}, but of {able}")
    if options.size is not None and options.size not in _known_sizes():
        suggestion = did_you_mean(options.size, _known_sizes()) or ";"
        raise ConfigError(
            f"command line: --size: unknown size {options.size!r}{suggestion} known are {', '.join(_known_sizes())}"
        )
    if scenario == "new-data" and options.name is not None:
        raise ConfigError("command line: --name is not an option of 'new-data': the run keeps its name")
    quoted_name = _toml_string("mine" if options.name is None else options.name)
    name = quoted_name[1:-1]  # part of other strings and of comments
    values: dict[str, str] = {"file": str(path), "name": quoted_name, "name_text": name}
    values |= {"folder": f"outputs/{name}", "steps": str(options.steps or 300)}
    values["constant_end"] = f"{int((options.steps or 300) * 0.8):08d}"
    values["size"] = _toml_string(options.size or _SIZES.get(scenario, "tiny"))
    for letter, (dataset, files) in zip("abc", _datasets(chosen, options.texts), strict=False):
        values |= {letter: dataset, f"text_{letter}": _toml_string(files)}
    if scenario == "released":
        values |= _released_model(options)
    if scenario == "new-data":
        values |= _stage_after(options.base or Path("mine.toml"), path)
    return _filled((_TEMPLATES / f"{scenario}.toml").read_text(encoding="utf-8"), values)


def _datasets(scenario: Scenario, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Name and text files of each dataset."""
    datasets = list(scenario.texts.items())
    if len(texts) > len(datasets):
        raise ConfigError(
            f"command line: --text is given {len(texts)} times; this scenario has {len(datasets)} datasets: "
            f"{', '.join(scenario.texts)}"
        )
    for index, text in enumerate(texts):
        name, equals, files = text.partition("=")
        if equals and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            datasets[index] = (name, files)
        else:
            datasets[index] = (datasets[index][0], text)
    names = [name for name, _ in datasets]
    if len(set(names)) < len(names):
        raise ConfigError(f"command line: --text: two datasets have the name {names[0]!r}; write --text NAME=FILES")
    return datasets


def _released_model(options: ScenarioOptions) -> dict[str, str]:
    """Family, size and names of the model to continue; the size of a release follows from its name."""
    model = "EleutherAI/pythia-160m" if options.model is None else options.model
    name, _, revision = model.partition("@")
    known = release_of_hub_name(name)
    if known is not None and options.size is None:
        families, size = [known.family], known.size_of(revision or "main")
    else:
        pythia = re.search(r"pythia-([\d.]+[mb])\b", model)
        size = options.size or (pythia[1] if pythia else "")
        families = [family for family, sizes in SIZES.items() if size in sizes]
    if not families:
        raise ConfigError(
            f"command line: --size must name the size of the model {model!r}; known are {', '.join(_known_sizes())}"
        )
    return {
        "model_name": name,
        "family": families[0],
        "size": _toml_string(size),
        "init": _toml_string(f"hf:{model}"),
    }


def _known_sizes() -> list[str]:
    """Named sizes of all families; those for a CPU, which every family has, first."""
    return sorted({size for sizes in SIZES.values() for size in sizes}, key=_ORDER.index)


def _stage_after(base: Path, path: Path) -> dict[str, str]:
    """`extends`, and the budget and schedule of a stage that follows the last one of a config.

    A stage after an infinite schedule continues its constant phase; after any other the learning rate is re-warmed.
    """
    if not base.exists():
        raise ConfigError(
            f"{base}: no such file; --base names the config of the run that gets new data. `titan-cpt init laptop "
            f"{base}` writes one for a new run"
        )
    config = load_config(base)
    last = config.stages[-1]
    budget = f"steps   = {last.steps}" if last.steps else f"tokens  = {last.tokens}"
    scheduled = next(stage.lr for stage in reversed(config.stages) if not isinstance(stage.lr, ContinueLR))
    infinite = scheduled.schedule.startswith("infinite")
    lr = getattr(scheduled, "constant" if infinite else "max")
    schedule = (_INFINITE if infinite else _REWARMED).format(schedule=scheduled.schedule, lr=lr)
    return {
        "base": _toml_string(os.path.relpath(base, path.parent)),
        "base_file": str(base),
        "name_text": config.job.name,
        "budget": budget,
        "schedule": schedule.rstrip("\n"),
    }


def _filled(template: str, values: Mapping[str, str]) -> str:
    """The template with its placeholders replaced; a comment behind code keeps its column if the code leaves room."""
    lines = []
    for line in template.splitlines():
        parts = _COMMENT.match(line)
        if parts is None or line.startswith("#"):
            lines.append(Template(line).substitute(values))
            continue
        code = Template(parts["code"]).substitute(values)
        column = max(parts.start("comment"), len(code) + 2)
        lines.append(f"{code:{column}}{Template(parts['comment']).substitute(values)}")
    return "\n".join(lines) + "\n"


def _checked(text: str, path: Path) -> Config:
    """The config of a text that is not written yet.

    Raises:
        ConfigError: it is invalid.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        write_text_atomically(draft, text)
        raw: dict[str, Any] = read_with_bases(draft)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        draft.unlink(missing_ok=True)
    return check_config(raw, path)


def _toml_string(text: str) -> str:
    """A TOML basic string; its escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
