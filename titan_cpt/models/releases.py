"""What is published about the training of released models: learning rates, tokens, stages, checkpoints, with sources.

The facts are in release_facts/*.toml, one file for each publisher. A fact that has no source is not in a file: it is
unknown (None) and never assumed. Does not import torch.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from titan_cpt.config.model import OWN_FAMILIES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FACTS = Path(__file__).with_name("release_facts")
_MAIN = "main"  # the hub's name for the revision that holds the release itself
_NOT_FACTS = ("hub", "remarks", "stages", "size")

T = TypeVar("T")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Fact(_Frozen, Generic[T]):
    """A published value and where it is published."""

    value: T
    source: str


class Decay(_Frozen):
    """How the LR falls after the warm-up, so that the LR of a checkpoint can be computed.

        lr(n) = peak                                               n <= from_step
        lr(n) = to + (peak - to) (1 + cos(pi x)) / 2                cosine,  x = (n - from_step) / steps, at most 1
        lr(n) = peak - (peak - to) x                               linear

    Attributes:
        from_step: the step after which the LR falls.
        steps: steps of the whole fall, even if training stopped earlier.
        to: LR at its end; a stage's `final_lr` is the lowest LR that was used.
        known_until: the last step for which this holds; None: the stage's end.
    """

    shape: Literal["cosine", "linear"]
    from_step: int
    steps: int
    to: float
    known_until: int | None = None


class ReleaseStage(_Frozen):
    """A stage of a release's training; LRs are absolute.

    Attributes:
        size: the named size from this stage on, if it is not the release's: after a context extension.
        end: the hub revision of the weights at its end.
        checkpoints: names of the revisions in between: a pattern with {step}, and how often there is one.
    """

    name: str
    size: str | None = None
    tokens: Fact[int] | None = None
    schedule: Fact[str] | None = None
    peak_lr: Fact[float] | None = None
    final_lr: Fact[float] | None = None
    warmup_steps: Fact[int] | None = None
    batch_tokens: Fact[int] | None = None
    seq_len: Fact[int] | None = None
    data: Fact[str] | None = None
    end: Fact[str] | None = None
    checkpoints: Fact[str] | None = None
    decay: Fact[Decay] | None = None

    def step_of(self, revision: str) -> int | None:
        """The step of a revision that the pattern of `checkpoints` names; None if it names another."""
        if self.checkpoints is None:
            return None
        pattern = re.escape(self.checkpoints.value.partition(",")[0])
        pattern = pattern.replace(r"\{step\}", r"(\d+)").replace(r"\{tokens\}", r"\d+")
        found = re.fullmatch(pattern, revision)
        return int(found[1]) if found else None

    def lr_at(self, step: int) -> Fact[float] | None:
        """The LR of a step, counted from 1; None if that is not known."""
        peak, warmup, decay = self.peak_lr, self.warmup_steps, self.decay
        if peak is None or warmup is None or decay is None or step > (decay.value.known_until or step):
            return None
        how, source = decay.value, f"computed from the schedule of {decay.source}"
        if step < warmup.value:
            return Fact(value=peak.value * step / warmup.value, source=source)
        x = min(1.0, max(0.0, (step - how.from_step) / how.steps))
        share = (1 + math.cos(math.pi * x)) / 2 if how.shape == "cosine" else 1 - x
        floor = self.final_lr.value if self.final_lr else how.to
        return Fact(value=max(floor, how.to + (peak.value - how.to) * share), source=source)


class Release(_Frozen):
    """A released base model that has a named size here.

    Attributes:
        hub: its names on the Hugging Face hub; all were trained as the stages say.
        total_tokens: tokens of all stages, where not every stage's own number is published.
        before_anneal: hub name and revision of the last public checkpoint before the final fall of the LR.
        remarks: what else a continuation should know.
        stages: in the order of training; `main` on the hub is the end of the last one.
    """

    family: str
    size: str
    hub: tuple[str, ...]
    tokenizer: Fact[str] | None = None
    tokenizer_size: Fact[int] | None = None
    weight_decay: Fact[float] | None = None
    betas: Fact[tuple[float, float]] | None = None
    total_tokens: Fact[int] | None = None
    before_anneal: Fact[str] | None = None
    remarks: tuple[Fact[str], ...] = ()
    stages: tuple[ReleaseStage, ...] = ()

    @property
    def sizes(self) -> tuple[str, ...]:
        """The named sizes that its weights have, in the order of training."""
        return (self.size, *(stage.size for stage in self.stages if stage.size is not None))

    def size_of(self, revision: str) -> str:
        """The named size of the weights of a hub revision; that of the first stage if the revision is not known."""
        last = self.stage_of(revision)
        passed = () if last is None else self.stages[: self.stages.index(last) + 1]
        return next((stage.size for stage in reversed(passed) if stage.size is not None), self.size)

    def revision_of(self, size: str) -> str:
        """The last hub revision whose weights have a named size: main, or the end of a stage before another size."""
        ends = [stage.end.value for stage in reversed(self.stages) if stage.end is not None]
        return next((revision for revision in (_MAIN, *ends) if self.size_of(revision) == size), _MAIN)

    @property
    def peak_lr(self) -> Fact[float] | None:
        """The highest LR of all stages; None unless that of the first is known."""
        known = [stage.peak_lr for stage in self.stages if stage.peak_lr is not None]
        return max(known, key=_value) if known and self.stages[0].peak_lr is not None else None

    @property
    def tokens(self) -> int | None:
        """Tokens of all stages; None if that is not known."""
        return _sum_of_tokens(self.stages) if self.total_tokens is None else self.total_tokens.value

    def lr_of(self, revision: str) -> Fact[float] | None:
        """The LR at which the weights of a hub revision were left; None if it is not known."""
        if revision == _MAIN:
            return self.stages[-1].final_lr if self.stages else None
        for stage in self.stages:
            if stage.end is not None and stage.end.value == revision:
                return stage.final_lr
            step = stage.step_of(revision)
            if step is not None:
                return stage.lr_at(step)
        return None

    def stage_of(self, revision: str) -> ReleaseStage | None:
        """The stage that the weights of a hub revision belong to; None if the revision is not known."""
        if revision == _MAIN:
            return self.stages[-1] if self.stages else None
        named = (each for each in self.stages if each.end is not None and each.end.value == revision)
        return next(named, next((each for each in self.stages if each.step_of(revision) is not None), None))

    def tokens_until(self, revision: str) -> int | None:
        """Tokens that trained the weights of a hub revision; None if that is not known."""
        last = self.stage_of(revision)
        if last is None:
            return None
        if revision == _MAIN:
            return self.tokens
        step = None if last.end is not None and last.end.value == revision else last.step_of(revision)
        if step is not None:  # of the first stage, or counted from its beginning
            return step * last.batch_tokens.value if last.batch_tokens else None
        return _sum_of_tokens(self.stages[: self.stages.index(last) + 1])


@cache
def releases() -> tuple[Release, ...]:
    """All releases of families that are here, by file and in the order of each file."""
    found = (release for path in sorted(FACTS.glob("*.toml")) for release in _read(path))
    return tuple(release for release in found if release.family in OWN_FAMILIES)


def release_of_hub_name(name: str) -> Release | None:
    """The release with this name on the hub, without revision; None if it is not known. Case does not matter."""
    found = (release for release in releases() if name.lower() in [each.lower() for each in release.hub])
    return next(found, None)


def release_of_size(family: str, size: str) -> Release | None:
    """The release that a named size describes; None if it is none."""
    return next((each for each in releases() if each.family == family and size in each.sizes), None)


def _sum_of_tokens(stages: Sequence[ReleaseStage]) -> int | None:
    """Tokens of stages; None if there are none, or one of them is not known."""
    known = [stage.tokens.value for stage in stages if stage.tokens is not None]
    return sum(known) if known and len(known) == len(stages) else None


def _value(fact: Fact[float]) -> float:
    return fact.value


def _read(path: Path) -> Iterator[Release]:
    """The releases of a file; what [common] says holds for each of them."""
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    for size, own in raw["releases"].items():
        table = _merged(raw.get("common", {}), own)
        stages = [
            {"name": name, "size": stage.get("size"), **_facts(stage, raw["sources"])}
            for name, stage in table.get("stages", {}).items()
        ]
        remarks = [_fact(pair, raw["sources"]) for pair in table.get("remarks", ())]
        facts = _facts(table, raw["sources"])
        yield Release.model_validate(
            {"family": raw["family"], "size": size, "hub": table["hub"], "stages": stages, "remarks": remarks, **facts}
        )


def _merged(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Both tables; values of `own` replace those of `common`, and tables in them are merged alike."""
    tables = {key: _merged(common[key], own[key]) for key in common if key in own and isinstance(own[key], dict)}
    return {**common, **own, **tables}


def _facts(table: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    return {key: _fact(pair, sources) for key, pair in table.items() if key not in _NOT_FACTS}


def _fact(pair: list[Any], sources: Mapping[str, str]) -> dict[str, Any]:
    value, source = pair
    return {"value": value, "source": sources[source]}
