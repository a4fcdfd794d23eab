"""The training plan: stages with steps, LR schedule, initial weights, data mixture and recipe. All values are frozen.

planner.py makes a plan, plan_text.py and plan_json.py print it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any, Literal

from titan_cpt.common.batch_sizes import BatchSizes
from titan_cpt.common.recipe import fingerprint
from titan_cpt.common.weights.averaging import Averaging
from titan_cpt.common.weights.new_rows import NewRowsPlan
from titan_cpt.common.weights.partition import Partition
from titan_cpt.common.weights.reptile import Reptile
from titan_cpt.data.mixture import Draw, Leaf, Tree, draws, leaf_counts, leaves
from titan_cpt.data.packing.pieces import PackingCounts
from titan_cpt.data.trained_text import Leg, trained_tokens
from titan_cpt.distributed.parallel_dims import ParallelDims
from titan_cpt.errors import PlanError
from titan_cpt.models.spec import ModelSpec
from titan_cpt.planning import lr_schedules
from titan_cpt.planning.memory import Footprint
from titan_cpt.planning.sharding import frozen_flops

BYTES_PER_SAVED_PARAMETER = 12  # fp32 master weight and two AdamW moments; Muon has one moment, so 4 bytes less


@dataclass(frozen=True)
class StageCheckpoint:
    """The checkpoint of a stage of this plan from which a later stage starts.

    Attributes:
        stage: the stage's name.
        steps_done: optimizer steps of that stage which its weights have been trained for.
        average: the later stage starts from their average in the checkpoint.
    """

    stage: str
    steps_done: int
    average: bool = False


@dataclass(frozen=True)
class TrainingHistory:
    """The training that the initial weights of a stage have had, over all stages of their lineage.

    Attributes:
        steps: optimizer steps.
        trained: sequences drawn as new data, by source (`dataset` or `dataset.domain`), in the order of training.
        replayed: tokens drawn as replay, by source: the next position in the trained text.
        exposure: exact number of tokens by dataset, replay included, in sequences of training.seq_len; the default
            weights of replay.
    """

    steps: int
    trained: Mapping[str, tuple[Leg, ...]]
    replayed: Mapping[str, int]
    exposure: Mapping[str, Fraction]

    def next_ordinal(self, source: str, seq_len: int) -> int:
        """The ordinal with which new data of a source continues in sequences of this length.

        That is the first one behind the number of tokens that were trained on.
        """
        return -(-trained_tokens(self.trained.get(source, ())) // seq_len)


@dataclass(frozen=True)
class MuonHyperparameters:
    """What Muon has beside the learning rate and the weight decay.

    Attributes:
        momentum: decay rate of the momentum buffer.
        nesterov: use Nesterov momentum.
        ns_steps: Newton-Schulz iterations.
        adjust_lr: factor of the learning rate, by the shape of the matrix.
    """

    momentum: float
    nesterov: bool
    ns_steps: int
    adjust_lr: Literal["match_rms_adamw", "original"]


MUON_KEYS = tuple(field.name for field in fields(MuonHyperparameters))
"""Keys of the config, of a recipe and of a parameter group that only Muon has."""


@dataclass(frozen=True)
class OptimizerHyperparameters:
    """Hyperparameters of the optimizer in one stage; the learning rate comes from the schedule.

    Attributes:
        muon: of Muon, which updates the matrices of the blocks; None where AdamW updates everything.
    """

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    muon: MuonHyperparameters | None = None

    @property
    def name(self) -> str:
        """As in the config."""
        return "AdamW" if self.muon is None else "Muon"


@dataclass(frozen=True)
class DatasetUse:
    """What a stage takes from a dataset or source.

    Attributes:
        tokens: all tokens, replay included.
        replayed_tokens: those of them that are replay.
        epochs: tokens as a multiple of the dataset's size; None while its files do not exist.
    """

    tokens: int
    replayed_tokens: int
    epochs: float | None


@dataclass(frozen=True)
class StagePlan:
    """One training stage.

    Attributes:
        datasets: names of the datasets whose data is new in this stage.
        init: the checkpoint that `previous` and `stage:NAME` mean; `random`, `checkpoint:PATH` and `hf:NAME` as text.
        keep_optimizer: optimizer state is loaded with the weights, instead of starting at zero.
        warm_up_passes: passes at LR 0, on the batches of the first steps, that warm up the optimizer state; 0 without.
        pre_anneal_step: steps done at the end of the constant phase of an infinite or wsd schedule; None without one.
        history: what the initial weights have been trained on.
        tree: the mixture; it gives the source and ordinal of every sequence of the stage.
        shares: exact share of each dataset in the stage's sequences, replay included.
        use_by_source: as `use_by_dataset`, by domain where there are domains.
        final_window: steps done at which the final loss is sampled; empty unless configured.
        recipe: the settings that must not change once training of the stage has started, by dotted key.
        spec: the model in this stage: `Plan.spec`, except for RoPE.
        seq_len: sequence length in tokens.
        batch_sizes: global batch size of every step.
        local_batch_size: sequences of a micro-batch of one data-parallel rank.
        document_mask: attention stays within a document.
        document_positions: RoPE's positions begin at 0 in each document.
        attended_spans: with a document mask, the mean number of positions that a token attends to in each layer, not
            halved for the causal mask; None without.
        averaging: the average of the stage's weights; None without.
        reptile: the pull towards old weights; None without.
        partition: what is trained, with which factor of the LR; None: all weights, alike.
        new_rows: the rows of new tokens that are initialized at the start of the stage; None without.
        schedule_offset: steps of the schedule before this stage, which continues that of the stage before; else 0.
    """

    name: str
    steps: int
    datasets: tuple[str, ...]
    schedule: lr_schedules.Schedule
    init: StageCheckpoint | str
    keep_optimizer: bool
    optimizer: OptimizerHyperparameters
    pre_anneal_step: int | None
    history: TrainingHistory
    tree: Tree
    shares: Mapping[str, Fraction]
    use_by_dataset: Mapping[str, DatasetUse]
    use_by_source: Mapping[str, DatasetUse]
    final_window: tuple[int, ...]
    recipe: Mapping[str, Any]
    spec: ModelSpec
    seq_len: int
    batch_sizes: BatchSizes
    local_batch_size: int
    document_mask: bool = False
    document_positions: bool = False
    attended_spans: tuple[float, ...] | None = None
    averaging: Averaging | None = None
    schedule_offset: int = 0
    warm_up_passes: int = 0
    reptile: Reptile | None = None
    partition: Partition | None = None
    new_rows: NewRowsPlan | None = None

    def step_tokens(self, step: int) -> int:
        """Tokens of the 0-based step `step`, over all ranks."""
        return self.batch_sizes.at(step) * self.seq_len

    def tokens_before(self, step: int) -> int:
        """Tokens of the stage's steps before the 0-based step `step`, over all ranks."""
        return self.batch_sizes.sequences_before(step) * self.seq_len

    @property
    def tokens(self) -> int:
        """Tokens of all steps, over all ranks."""
        return self.tokens_before(self.steps)

    @property
    def flops_per_token(self) -> float:
        """Floating-point operations of training per token, without those that frozen weights save."""
        spans = self.attended_spans
        length = self.seq_len
        full = self.spec.flops_per_token(length) if spans is None else self.spec.masked_flops_per_token(length, spans)
        if self.partition is None:
            return full
        return full - frozen_flops(self.spec, self.partition, spans or self.spec.attended_spans(length))

    @property
    def attended_span(self) -> float | None:
        """Mean of `attended_spans` over the layers; None without a document mask."""
        return None if self.attended_spans is None else statistics.fmean(self.attended_spans)

    @property
    def warm_up_flops(self) -> float:
        """Floating-point operations of the passes that warm up the optimizer state, in addition to training."""
        return self.flops_per_token * self.tokens_before(self.warm_up_passes)

    @property
    def source_numbers(self) -> dict[tuple[str, bool], int]:
        """A number from 0 for every (source, whether it is replayed) of the mixture."""
        return {(leaf.source, leaf.replayed): number for number, leaf in enumerate(leaves(self.tree))}

    def leaf_counts(self, steps: int | None = None) -> dict[Leaf, int]:
        """Number of sequences of every leaf of the mixture in the first `steps` steps, or in all of them."""
        return leaf_counts(self.tree, self.batch_sizes.sequences_before(self.steps if steps is None else steps))

    def copies_due(self, steps_done: int) -> bool:
        """Whether a copy of the weights is taken after these steps of the stage: they must be known to be good."""
        takes_snapshot = self.averaging is not None and self.averaging.due(steps_done)
        return takes_snapshot or (self.reptile is not None and self.reptile.is_due(steps_done))

    def weight_copies(self, *, on_host: bool) -> int:
        """The largest number of float32 copies of the weights in host memory, or beside the weights."""
        kept = [(self.averaging, 0 if self.averaging is None else self.averaging.in_memory), (self.reptile, 1)]
        return sum(count for what, count in kept if what is not None and what.on_host == on_host)

    def lr_at(self, step: int) -> float:
        """The LR of the 0-based step `step`: eta(step + 1), as the schedule counts steps from 1."""
        return lr_schedules.lr_at(self.schedule, self.schedule_offset + step + 1)

    @property
    def peak_lr(self) -> float:
        """The highest LR of all steps."""
        # Phases are monotonic: the highest LR is at the first or last step, or beside the border of two phases.
        borders = {math.floor(phase.end) - self.schedule_offset + side for phase in self.schedule for side in (-1, 0)}
        steps = {0, self.steps - 1} | {step for step in borders if 0 <= step < self.steps}
        return max(self.lr_at(step) for step in steps)

    @property
    def final_lr(self) -> float:
        """The LR of the last step."""
        return self.lr_at(self.steps - 1)


def ancestors(stage: StagePlan, stages: Mapping[str, StagePlan]) -> Iterator[StagePlan]:
    """The stages that trained the initial weights of a stage, the latest first.

    Args:
        stages: all stages of the run, by name.
    """
    while isinstance(stage.init, StageCheckpoint):
        stage = stages[stage.init.stage]
        yield stage


def schedule_span(stage: StagePlan, stages: Sequence[StagePlan]) -> Sequence[StagePlan]:
    """The stages, in order, that the LR schedule of a stage spans: one, unless later stages continue it.

    Args:
        stages: all stages of the run.
    """
    first = stages.index(stage)
    while stages[first].schedule_offset:
        first -= 1
    last = first + 1
    while last < len(stages) and stages[last].schedule_offset:
        last += 1
    return stages[first:last]


@dataclass(frozen=True)
class Plan:
    """The plan of a run on a given number of ranks.

    Attributes:
        parallel_dims: parallelism degrees, with the pipeline micro-batches of training.local_batch_size.
        stage_dims: parallelism degrees by stage; stages differ only in their pipeline micro-batches.
        data_parallel: data-parallel degree: number of ranks, or groups of ranks, that train on different sequences.
        footprints: memory and communication of a rank, by stage.
        seq_len, global_batch_size, local_batch_size: those of [training]; a stage may have others.
        sequences: number of sequences by source and sequence length; None while the source's files do not exist.
        packing: how documents fill sequences by source and sequence length, of sources that pack them.
        base_recipe: the settings that must not change during the run, by dotted key.
        notes: warnings, shown before training.
    """

    name: str
    spec: ModelSpec
    stages: tuple[StagePlan, ...]
    seed: int
    seq_len: int
    global_batch_size: int
    local_batch_size: int
    parallel_dims: ParallelDims
    data_parallel: int
    stage_dims: Mapping[str, ParallelDims]
    footprints: Mapping[str, Footprint]
    sequences: Mapping[tuple[str, int], int | None]
    base_recipe: Mapping[str, Any]
    notes: tuple[str, ...]
    packing: Mapping[tuple[str, int], PackingCounts] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.parallel_dims.world_size

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step over all ranks, with the batch of [training]; a stage may have another."""
        return self.global_batch_size * self.seq_len

    @property
    def gradient_accumulation_steps(self) -> int:
        """Local batches of a data-parallel rank in a step, with the batch of [training]; a stage may have another."""
        return self.global_batch_size // (self.data_parallel * self.local_batch_size)

    @property
    def footprint(self) -> Footprint:
        """Memory and communication of a rank in the stage that needs the most memory."""
        return max(self.footprints.values(), key=lambda costs: costs.memory)

    @property
    def fingerprint(self) -> str:
        """Eight hexadecimal digits of a hash of the recipe; equal for plans that train the same."""
        return fingerprint(self.recipe_until(len(self.stages) - 1))

    @property
    def by_name(self) -> dict[str, StagePlan]:
        """The stages by name."""
        return {stage.name: stage for stage in self.stages}

    def stage(self, name: str) -> StagePlan:
        """The stage with that name.

        Raises:
            PlanError: no stage has that name.
        """
        if name not in self.by_name:
            raise PlanError(f"there is no stage {name!r}; stages are {', '.join(map(repr, self.by_name))}")
        return self.by_name[name]

    def steps_before(self, stage: StagePlan) -> int:
        """Optimizer steps of all stages that the run trains before this one."""
        return sum(earlier.steps for earlier in self.stages[: self.stages.index(stage)])

    def tokens_before(self, stage: StagePlan) -> int:
        """Tokens of all stages that the run trains before this one."""
        return sum(earlier.tokens for earlier in self.stages[: self.stages.index(stage)])

    def tokens_at(self, run_step: int) -> int:
        """Tokens of the first `run_step` steps of the run."""
        return sum(stage.tokens_before(steps) for stage, steps in self._parts(run_step))

    def flops_at(self, run_step: int) -> float:
        """Floating-point operations of training in the first `run_step` steps of the run."""
        return sum(stage.flops_per_token * stage.tokens_before(steps) for stage, steps in self._parts(run_step))

    def _parts(self, run_step: int) -> Iterator[tuple[StagePlan, int]]:
        """Every stage, and how many of its steps are among the first `run_step` of the run."""
        for stage in self.stages:
            yield stage, min(stage.steps, run_step)
            run_step -= min(stage.steps, run_step)

    def schedule_span(self, stage: StagePlan) -> Sequence[StagePlan]:
        """See `schedule_span`."""
        return schedule_span(stage, self.stages)

    def accumulation(self, stage: StagePlan, step: int) -> int:
        """Local batches of one data-parallel rank in the 0-based step `step` (gradient accumulation)."""
        return stage.batch_sizes.at(step) // (stage.local_batch_size * self.data_parallel)

    def forgetting_since(self, stage: StagePlan, dataset: str) -> str | None:
        """The stage whose loss on `dataset`, or a label of it, at step 0 is the baseline of its forgetting, or None.

        That is the first stage after the last one on the lineage in which the dataset was new. For pretrained weights
        it is their first stage in this run.
        """
        name = dataset.partition("@")[0].partition(".")[0]
        if name in stage.datasets:
            return None
        first = stage
        for parent in ancestors(stage, self.by_name):
            if name in parent.datasets:
                return first.name
            first = parent
        return None if first.init == "random" else first.name

    def recipe_until(self, index: int) -> dict[str, Any]:
        """The recipe of the run up to and including stage `index`, flat, by dotted key."""
        stages = self.stages[: index + 1]
        recipe = {**self.base_recipe, "stages": [stage.name for stage in stages]}
        for stage in stages:
            recipe |= {f"stages.{stage.name}.{key}": value for key, value in stage.recipe.items()}
        return recipe

    def batch(self, stage: StagePlan, step: int) -> list[Draw]:
        """The sequences of the global batch of the 0-based step `step` of a stage, in batch order.

        Raises:
            PlanError: the stage has no such step, or its order depends on data that does not exist yet.
        """
        if not 0 <= step < stage.steps:
            raise PlanError(f"stages.{stage.name}: has steps 0 to {stage.steps - 1}, got {step}")
        unknown = [leaf.source for leaf in leaves(stage.tree) if leaf.reshuffle_key and leaf.seen is None]
        if unknown:
            raise PlanError(
                f"stages.{stage.name}: the order of reshuffled replay of {unknown[0]!r} depends on the size of its "
                "data, which does not exist yet: prepare it first"
            )
        return draws(stage.tree, stage.batch_sizes.sequences_before(step), stage.batch_sizes.sequences_before(step + 1))

    def disk_bytes(self, keep_latest_k: int) -> int:
        """Maximum bytes of all checkpoints: the latest ones, stage ends, pre-anneal points, and one being written."""
        inside = [self._checkpoint_bytes(stage, resumable=True) for stage in self.stages]
        ends = sum(self._checkpoint_bytes(stage, resumable=False) for stage in self.stages)
        before_annealing = sum(
            size for stage, size in zip(self.stages, inside, strict=True) if stage.pre_anneal_step is not None
        )
        return ends + before_annealing + (keep_latest_k + 1) * max(inside)

    def _checkpoint_bytes(self, stage: StagePlan, *, resumable: bool) -> int:
        """Bytes of a checkpoint of this stage; a stage's end is not resumable within the stage."""
        matrices = sum(math.prod(size) for _, size, _ in self.spec.block_parameters() if len(size) == 2)
        saved = self.spec.layers * matrices * 4 if stage.optimizer.muon is not None else 0
        copies = int(stage.reptile is not None)
        copies += 0 if stage.averaging is None else stage.averaging.saved(resumable=resumable)
        if stage.partition is not None:
            state = stage.partition.saved_state_bytes(muon=stage.optimizer.muon is not None)
            return self.spec.parameters * 4 * (1 + copies) + state
        return self.spec.parameters * (BYTES_PER_SAVED_PARAMETER + 4 * copies) - saved
