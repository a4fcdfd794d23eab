"""Notes on stages that train a released model, compared with what is published about the release's own training.

Source of the facts: models/release_facts. What is not published is not compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from titan_cpt.common.readable import shortest_count
from titan_cpt.models.releases import Fact, Release
from titan_cpt.planning.plan import StagePlan, schedule_span
from titan_cpt.planning.stages.notes import lr_changes

_WITHOUT_DECAY = ("infinite", "wsd", "constant")  # schedules that are meant to start from weights before an annealing
_REWARMED = 2.0  # ratio of a stage's peak to the LR before it, from which it re-warms


@dataclass(frozen=True)
class OtherTraining:
    """What an import recorded of the training of its weights in another trainer; None: unknown.

    Attributes:
        trainer: its name.
        steps: optimizer steps.
        tokens: tokens of these steps.
        lr: learning rate of the last step, or the one that the next step would have had.
    """

    trainer: str
    steps: int | None = None
    tokens: int | None = None
    lr: float | None = None


@dataclass(frozen=True)
class ReleasedWeights:
    """The release that weights are of.

    Attributes:
        name: as the notes call it.
        release: what is known of it; None: nothing.
        revision: the hub revision; None if it is not known which one the weights are of.
        training: of weights that were imported from another trainer, and are not those of a release any more.
    """

    name: str
    release: Release | None
    revision: str | None = None
    training: OtherTraining | None = None

    @property
    def left_at(self) -> Fact[float] | None:
        """The LR at which the weights were left; None if it is not known."""
        return None if self.release is None or self.revision is None else self.release.lr_of(self.revision)

    @property
    def seq_len(self) -> int | None:
        """The length in tokens of the sequences that last trained the weights; None if it is not known."""
        stage = None if self.release is None or self.revision is None else self.release.stage_of(self.revision)
        return None if stage is None or stage.seq_len is None else stage.seq_len.value


def release_notes(
    stages: Sequence[StagePlan], weights: Mapping[str, ReleasedWeights], token_ids: int | None
) -> Iterator[str]:
    """The notes of the stages that start from a release, in order.

    Args:
        weights: `init` of a stage -> the release that it names. Other stages have no note.
        token_ids: number of ids of the run's tokenizer; None if it is unknown, or extends the release's.
    """
    for stage in stages:
        found = weights.get(stage.init) if isinstance(stage.init, str) else None
        if found is None:
            continue
        peak = max(spanned.peak_lr for spanned in schedule_span(stage, stages))
        if found.training is not None:
            yield _other_summary(stage, found.name, found.training)
            yield from lr_changes(stage, peak=peak, last_lr=found.training.lr, earlier_peak=None)
            continue
        if found.release is None or not found.release.stages:
            yield (
                f"stages.{stage.name}.init: nothing is known of the training of {found.name}, such as the LR at which "
                "it was left; `titan-cpt models` lists the known releases"
            )
            continue
        yield _summary(stage, found, found.release)
        left, highest = found.left_at, found.release.peak_lr
        yield from lr_changes(
            stage,
            peak=peak,
            last_lr=None if left is None else left.value,
            earlier_peak=None if highest is None else highest.value,
        )
        yield from _earlier_checkpoint(stage, found, found.release, peak)
        yield from _shorter(stage, found)
        yield from _other_tokenizer(stage, found, found.release, token_ids)


def _other_summary(stage: StagePlan, name: str, training: OtherTraining) -> str:
    """What another trainer recorded of the weights, and what this stage adds, in one note."""
    steps = "" if training.steps is None else f" for {training.steps:,} steps"
    tokens = "" if training.tokens is None else f", on {shortest_count(training.tokens)} tokens"
    left = "at which LR it was left is not recorded" if training.lr is None else f"it was left at LR {training.lr:.3g}"
    return (
        f"stages.{stage.name}.init: {name} was trained with {training.trainer}{steps}{tokens}; {left}. This stage adds "
        f"{shortest_count(stage.tokens)} tokens at a peak of {stage.peak_lr:.3g}"
    )


def _summary(stage: StagePlan, found: ReleasedWeights, release: Release) -> str:
    """What the release's training was and what this stage adds, in one note."""
    revision = "main" if found.revision is None else found.revision
    tokens, peak, left = release.tokens_until(revision), release.peak_lr, release.lr_of(revision)
    trained = f" on {shortest_count(tokens)} tokens" if tokens else ""
    at = f"at a peak LR of {peak.value:.3g}" if peak else "at an LR that is not published"
    share = f" ({100 * stage.tokens / tokens:.2g} % of these)" if tokens else ""
    sources = [peak.source] if peak else []
    ending = ""
    if found.revision is None:
        ending = "; which revision these weights are of is not known, so neither is the LR at which they were left"
    elif left is not None:
        ending = f" and left at {left.value:.3g}"
        sources += [left.source] if left.source not in sources else []
    elif peak is not None:
        ending = "; at which LR it was left is not known"
    cited = f" ({'; '.join(sources)})" if sources else ""
    return (
        f"stages.{stage.name}.init: {found.name} was trained{trained} {at}{ending}{cited}. This stage adds "
        f"{shortest_count(stage.tokens)}{share} at a peak of {stage.peak_lr:.3g}"
    )


def _earlier_checkpoint(stage: StagePlan, found: ReleasedWeights, release: Release, peak: float) -> Iterator[str]:
    """Where a checkpoint before the annealing is, if the stage's schedule would rather start from that."""
    left = found.left_at
    schedule = str(stage.recipe["lr.schedule"])
    suits_annealed = not schedule.startswith(_WITHOUT_DECAY) and (left is None or peak <= _REWARMED * left.value)
    if release.before_anneal is None or found.revision is None or suits_annealed:
        return
    name, _, revision = release.before_anneal.value.partition("@")
    before = release.lr_of(revision)
    if found.revision == revision or (left is not None and before is not None and left.value >= before.value):
        return
    at = f", left at {before.value:.3g}" if before is not None else ""
    yield (
        f"stages.{stage.name}.init: the last public checkpoint before the annealing is hf:{name}@{revision}{at} "
        f"({release.before_anneal.source}); when the LR rises again, annealed weights lose what the annealing gave"
    )


def _shorter(stage: StagePlan, found: ReleasedWeights) -> Iterator[str]:
    if found.seq_len is not None and stage.seq_len < found.seq_len:
        yield (
            f"stages.{stage.name}: trains on sequences of {stage.seq_len:,} tokens, and these weights were last "
            f"trained on {found.seq_len:,}: what they know of longer contexts is not rehearsed"
        )


def _other_tokenizer(
    stage: StagePlan, found: ReleasedWeights, release: Release, token_ids: int | None
) -> Iterator[str]:
    known = release.tokenizer_size
    if known is not None and token_ids is not None and token_ids != known.value:
        name = f" ({release.tokenizer.value})" if release.tokenizer is not None else ""
        yield (
            f"stages.{stage.name}.init: the tokenizer of {found.name}{name} has {known.value:,} ids ({known.source}), "
            f"and tokenizer.path has {token_ids:,}: with another tokenizer the same ids mean other tokens"
        )
