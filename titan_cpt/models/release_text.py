"""Families, named sizes and what is published about the releases behind them, as text and as JSON.

A fact that has no source is shown as unknown. Does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from titan_cpt.common.readable import shortest_count
from titan_cpt.common.text import did_you_mean, wrapped
from titan_cpt.errors import ConfigError
from titan_cpt.models.registry import family_names, named_size, spec_class
from titan_cpt.models.releases import Fact, Release, ReleaseStage, release_of_hub_name, release_of_size

UNKNOWN = "unknown"
_INDENT = 17  # columns of the names of facts


@dataclass(frozen=True)
class Size:
    """A named size of a family, and the release that it describes; None: it describes none."""

    family: str
    name: str
    release: Release | None

    @property
    def parameters(self) -> int:
        """Parameters with the release's vocabulary, or with the smallest one if it describes no release."""
        return named_size(self.family, self.name, 1).parameters

    def as_json(self) -> dict[str, Any]:
        """As an object of `titan-cpt models --json`; a fact is an object of value and source, or null."""
        release = None if self.release is None else self.release.model_dump(exclude={"family", "size"})
        return {"family": self.family, "size": self.name, "parameters": self.parameters, "release": release}


def find_sizes(name: str | None) -> list[Size]:
    """All sizes, those of a family, those of a name, or that of a release on the hub.

    Raises:
        ConfigError: the name is none of these.
    """
    every = [
        Size(family, size, release_of_size(family, size))
        for family in family_names()
        for size in spec_class(family).sizes()
    ]
    if name is None:
        return every
    hub = release_of_hub_name(name.partition("@")[0])
    found = [each for each in every if name in (each.family, each.name) or (hub is not None and each.release == hub)]
    if not found:
        known = [*family_names(), *dict.fromkeys(each.name for each in every)]
        raise ConfigError(
            f"command line: unknown model {name!r}{did_you_mean(name, known) or '.'} Give a family, a size or a hub "
            "name; `titan-cpt models` lists them"
        )
    return found


def table_lines(sizes: Sequence[Size]) -> Iterator[str]:
    """A line for each size, at most 80 columns wide; tokens and LRs are those of the whole training."""
    family = None
    for size in sizes:
        if size.family != family:
            yield from ([] if family is None else [""])
            family = size.family
            yield f"{family:15} {'params':>7} {'tokens':>7} {'peak LR':>8} {'left at':>8}  on the hub"
        row = f"{size.name:15} {shortest_count(size.parameters, 3):>7}"
        if size.release is None:
            yield f"{row} {'':>7} {'':>8} {'':>8}  not a release"
            continue
        release = size.release
        revision = release.revision_of(size.name)
        trained, left = release.tokens_until(revision), release.lr_of(revision)
        tokens = UNKNOWN if trained is None else shortest_count(trained, 3)
        peak, final = (UNKNOWN if fact is None else f"{fact.value:.3g}" for fact in (release.peak_lr, left))
        name = release.hub[0] if release.hub else UNKNOWN
        yield f"{row} {tokens:>7} {peak:>8} {final:>8}  {name}"
        if revision != "main":
            yield f"{'':51}@{revision}"


def detail_lines(size: Size, width: int) -> Iterator[str]:
    """All facts of a size, with the numbers of their sources, and the list of these."""
    yield f"{size.name} ({size.family}): {shortest_count(size.parameters)} parameters"
    release = size.release
    if release is None:
        yield "not a release"
        return
    sources: list[str] = []
    facts = [
        ("on the hub", ", ".join(release.hub) or UNKNOWN),
        ("tokenizer", _cited(release.tokenizer, sources)),
        ("its ids", _cited(release.tokenizer_size, sources, ",")),
        ("weight decay", _cited(release.weight_decay, sources)),
        ("Adam's betas", _cited(release.betas, sources)),
        *([("before annealing", _before_anneal(release, sources))] if len(release.stages) > 1 else []),
        *([("tokens in total", _cited(release.total_tokens, sources, ","))] if release.total_tokens else []),
        *(("remark", _cited(remark, sources)) for remark in release.remarks),
    ]
    yield from _wrapped(facts, width)
    for stage in release.stages:
        yield ""
        yield stage.name
        yield from _wrapped(_stage_facts(stage, sources), width)
    if not release.stages:
        yield from _wrapped([("training", UNKNOWN)], width)
    if sources:
        yield ""
        yield from _wrapped([(f"[{number}]", source) for number, source in enumerate(sources, 1)], width, indent=5)


def _stage_facts(stage: ReleaseStage, sources: list[str]) -> list[tuple[str, str]]:
    peak, final = _cited(stage.peak_lr, sources), _cited(stage.final_lr, sources)
    return [
        ("tokens", _cited(stage.tokens, sources, ",")),
        ("LR", f"{peak} to {final}" if stage.peak_lr or stage.final_lr else UNKNOWN),
        ("schedule", _cited(stage.schedule, sources)),
        ("warm-up steps", _cited(stage.warmup_steps, sources, ",")),
        ("tokens per step", _cited(stage.batch_tokens, sources, ",")),
        ("sequence length", _cited(stage.seq_len, sources, ",")),
        ("data", _cited(stage.data, sources)),
        ("end revision", _cited(stage.end, sources)),
        ("checkpoints", _cited(stage.checkpoints, sources)),
    ]


def _before_anneal(release: Release, sources: list[str]) -> str:
    """The checkpoint before the annealing, and the LR at which it was left."""
    text = _cited(release.before_anneal, sources)
    if release.before_anneal is None:
        return text
    left = release.lr_of(release.before_anneal.value.partition("@")[2])
    return f"{text}, left at {_cited(left, sources)}" if left is not None else text


def _cited(fact: Fact[Any] | None, sources: list[str], form: str = "") -> str:
    """A fact with the number of its source, which is added to `sources` if it is new."""
    if fact is None:
        return UNKNOWN
    if fact.source not in sources:
        sources.append(fact.source)
    value = fact.value
    if isinstance(value, float):
        form = ".5g"
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else f"{value:{form}}"
    return f"{text} [{sources.index(fact.source) + 1}]"


def _wrapped(facts: Sequence[tuple[str, str]], width: int, indent: int = _INDENT) -> Iterator[str]:
    """A line for each name and its text, which continues below itself."""
    for name, text in facts:
        for number, line in enumerate(wrapped(text, width - indent)):
            yield f"{name if number == 0 else '':{indent}}{line.strip()}"
