"""The tables [[stages]]: data, budget, batch, initial weights, optimizer, learning rate and replay of each stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from titan_cpt.common.weights.new_rows import NewRowsKind
from titan_cpt.config.lr import LR
from titan_cpt.config.model import StageRopeConfig
from titan_cpt.config.types import (
    EndPoint,
    Fraction01,
    GlobalBatchSize,
    LRScale,
    Mixture,
    Name,
    NonNegativeFloat,
    OptimizerState,
    PositiveFloat,
    PositiveInt,
    StageMixture,
    Table,
    Tokens,
    WeightPatterns,
    validation_error,
)


class AveragingConfig(Table):
    """[averaging]: an average of a stage's newest weights, which has no effect on training."""

    kind: Literal["mean", "ema", "like_decay"]
    """mean: of the snapshots in the window; ema: exponential moving average of all snapshots of the stage; like_decay:
    weights that imitate an LR decay over the window, for a schedule whose LR is constant there."""
    shape: Literal["linear", "sqrt", "cosine"] | None = None
    """Shape of the decay that like_decay imitates: linear (the same as mean), sqrt (1 - sqrt), cosine. Unset: sqrt."""
    last: EndPoint = 0.2
    """Length of the window that ends with the newest snapshot: a fraction of the stage, a number of steps, or tokens
    ("3B"); at most the whole stage. For ema the time constant of the average."""
    every: EndPoint | None = None
    """Distance of two snapshots, written as `last`. Unset: a tenth of `last`. Every snapshot in the window is a float32
    copy of the weights, in memory and in interval checkpoints; ema needs one copy in all."""
    keep_on: Literal["host", "device"] = "host"
    """Where the copies are kept, each rank's own shards: in host memory, or on the device."""

    @model_validator(mode="after")
    def _shape_is_of_a_decay(self) -> AveragingConfig:
        if self.shape is not None and self.kind != "like_decay":
            raise validation_error(f'shape is for kind = "like_decay", got kind = "{self.kind}"; remove it')
        return self


def _table_or_off(value: Any) -> Any:
    if value == "off" or isinstance(value, dict | AveragingConfig):
        return value
    raise validation_error(f'must be a table such as {{ kind = "mean" }}, or "off", got {value!r}')


# With tags only the faults of the table that was meant are reported, not also that it is not "off".
StageAveraging = Annotated[
    Annotated[AveragingConfig, Tag("[table]")] | Annotated[Literal["off"], Tag("[off]")],
    Discriminator(lambda value: "[off]" if value == "off" else "[table]"),
    BeforeValidator(_table_or_off),
]
"""A stage's own average, or none."""


class StageOptimizerConfig(Table):
    """[stages.optimizer]: the optimizer or hyperparameters of this stage, where they differ from [optimizer]."""

    name: Literal["AdamW", "Muon"] | None = None
    """Replaces optimizer.name in this stage. Where this changes the optimizer, the state of the blocks' matrices begins
    anew."""
    momentum: Fraction01 | None = None
    """Replaces optimizer.momentum in this stage."""
    nesterov: bool | None = None
    """Replaces optimizer.nesterov in this stage."""
    ns_steps: Annotated[int, Field(ge=1, lt=100)] | None = None
    """Replaces optimizer.ns_steps in this stage."""
    adjust_lr: Literal["match_rms_adamw", "original"] | None = None
    """Replaces optimizer.adjust_lr in this stage."""

    beta1: Fraction01 | None = None
    """Replaces optimizer.beta1 in this stage."""
    beta2: Fraction01 | None = None
    """Replaces optimizer.beta2 in this stage."""
    eps: PositiveFloat | None = None
    """Replaces optimizer.eps in this stage."""
    weight_decay: NonNegativeFloat | None = None
    """Replaces optimizer.weight_decay in this stage."""


class ReplayConfig(Table):
    """[stages.replay]: replay of earlier datasets, in place of new sequences; the stage's token budget is unchanged."""

    fraction: Fraction01
    """Replay fraction: share of the stage's sequences that are drawn from earlier datasets; 0.05 is the usual choice,
    0.01 for a weak distribution shift."""
    from_: Annotated[Mixture | None, Field(alias="from")] = None
    """Datasets to replay, or a table of datasets and weights. Unset: every earlier dataset, weighted by the number of
    its tokens that the run has trained on."""
    order: Literal["as_trained", "reshuffled"] = "as_trained"
    """Replay sequences in the order in which they were first trained on, or in a new permutation of them."""
    on_exhausted: Literal["error", "repeat"] = "error"
    """If replay needs more sequences of a dataset than were trained on: refuse the config, or repeat them."""


class ReptileConfig(Table):
    """[stages.reptile]: pull the weights back towards those of before, at regular intervals (arXiv:2508.01908)."""

    every: PositiveInt
    """Steps of the stage from one pull to the next; 500 in the paper."""
    step: Annotated[float, Field(gt=0, le=1)]
    """Share of the way from the old weights to the new ones that a pull leaves: old + step x (new - old), where the old
    weights are those after the last pull, at first the stage's initial ones; 0.1 in the paper, 1: no pull."""
    keep_on: Literal["host", "device"] = "host"
    """Where the float32 copy of the old weights is kept between pulls."""


class StageConfig(Table):
    """[[stages]]: one training stage."""

    name: Name
    """The stage's name, in overrides and `init`, and the name of the folder of its checkpoints."""
    dataset: StageMixture
    """Dataset to train on, or a table of datasets and weights; or { of = ["a", "b"], by = "tokens", temperature = 0.5,
    max_epochs = 4 }: weights proportional to tokens^temperature (1 by default), where no dataset is repeated more often
    than max_epochs times in this stage."""
    steps: PositiveInt | None = None
    """Number of optimizer steps. Set either steps or tokens."""
    tokens: Tokens | None = None
    """Token budget, such as "300B", rounded up to whole steps. Set either steps or tokens."""
    seq_len: Annotated[int, Field(ge=2)] | None = None
    """Sequence length of this stage in tokens. Unset: training.seq_len."""
    global_batch_size: GlobalBatchSize | None = None
    """Sequences per optimizer step of this stage, over all ranks; or a batch-size ramp, a table from tokens of this
    stage to sequences, such as { "0" = 256, "5B" = 1024 }: the size changes with the first step that begins at or after
    that many tokens. Unset: training.global_batch_size."""
    local_batch_size: PositiveInt | None = None
    """Sequences per micro-batch of one data-parallel rank in this stage. Unset: training.local_batch_size."""
    document_mask: bool | None = None
    """Whether attention stays within a document in this stage. Unset: training.document_mask."""
    document_positions: bool | None = None
    """Whether rotary positions begin at 0 in each document in this stage. Unset: training.document_positions."""
    init: str | None = None
    """Initial weights: previous (the end of the stage before; after an infinite schedule its pre-anneal point), random,
    stage:NAME, stage:NAME@pre_anneal, checkpoint:PATH, hf:NAME. stage:NAME@average, stage:NAME@pre_anneal@average and
    checkpoint:PATH@average are the averages of the weights there. Unset: random for the first stage, else previous."""
    weak_rows: Literal["error", "keep", "mean"] | None = None
    """What to do with weak rows of the embedding and the head, where weights come from outside of the run (checkpoint:
    or hf:): rows of tokens that are near zero, equal, not finite, or that training never changed. error: refuse weights
    with weak rows that the stage's data uses; keep: name them; mean: replace them by the mean of all other tokens'
    rows. Unset: keep. Rows that are not finite are refused unless they are replaced."""
    new_rows: NewRowsKind | None = None
    """With [tokenizer.extend]: initialize the embedding and head rows of the tokenizer's new tokens at the start of the
    stage. pieces: each is the mean of the rows of the old tokens that make up its text; mean: of all old rows; normal:
    drawn from a normal distribution with the mean and standard deviation of the old rows in each column. Padding rows
    become the mean of the old rows. Unset: pieces if the initial weights were trained with the base tokenizer,
    otherwise rows stay as they are."""
    optimizer_state: OptimizerState = "reset"
    """Whether the optimizer state (moments and step count) is reset, or kept together with the weights; or
    "warm:100": reset, and then warmed up by 100 forward and backward passes on the batches of the stage's first 100
    steps, with optimizer updates at learning rate 0, before training begins at the first of these batches. An average
    has none to keep: the moments belong to the weights that training continues with. Unset in a stage with
    lr = { schedule = "continue" }: keep."""
    optimizer: StageOptimizerConfig | None = None
    """The optimizer, or hyperparameters, that differ in this stage."""
    lr: LR
    """Learning-rate schedule, one of the tables below."""
    trainable: WeightPatterns | None = None
    """What this stage trains, as patterns of our parameter names, such as ["embedding", "blocks.0-3.attention",
    "head"]; all other weights are frozen: they stay bit-equal and have no optimizer state. A pattern matches every name
    that begins with it, component by component; `*` stands for any characters of a component, and 3-7 for the numbers
    from 3 to 7. "embedding.new" and "head.new" are only the rows of the ids that [tokenizer] extend adds. Unset:
    everything."""
    lr_scale: LRScale | None = None
    """Factors of this stage's learning rate, by pattern as in `trainable`, such as { embedding = 0.1, "blocks.0-3" =
    0.5 }; of several patterns that match a weight, the one with the most components decides. Weights without a pattern
    have the factor 1. Weight decay, which is multiplied by the learning rate, is scaled with it."""
    averaging: StageAveraging | None = None
    """Average of this stage's weights, in place of [averaging]; "off" for none. Unset: [averaging]."""
    replay: ReplayConfig | None = None
    """Replay of earlier data. Unset: no replay."""
    reptile: ReptileConfig | None = None
    """Reptile: pull the weights back towards those of before, against forgetting; with replay. Unset: no pull."""
    rope: StageRopeConfig | None = None
    """RoPE of the weights from this stage on, for context extension. Unset: that of the stage's initial weights."""

    @property
    def warm_up_passes(self) -> int:
        """Passes at LR 0 that warm up the optimizer state before the first step; 0 without."""
        return int(self.optimizer_state.removeprefix("warm:")) if self.optimizer_state.startswith("warm:") else 0

    @model_validator(mode="before")
    @classmethod
    def _continued_schedule_keeps_the_optimizer(cls, raw: Any) -> Any:
        lr = raw.get("lr") if isinstance(raw, dict) else None
        continues = isinstance(lr, dict) and lr.get("schedule") == "continue"
        return {"optimizer_state": "keep", **raw} if continues else raw
