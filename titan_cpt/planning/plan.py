"""What a plan is: stages in steps, LR curves, lineage and cursors, mixtures, the recipe and its fingerprint.

All of it is frozen numbers; planning.py works them out, plan_view.py shows them. No torch, no device, no clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from titan_cpt.common.recipe import fingerprint
from titan_cpt.data.mixture import Draw, Tree, draws, leaves
from titan_cpt.distributed.parallel_dims import ParallelDims
from titan_cpt.errors import PlanError
from titan_cpt.models.spec import ModelSpec
from titan_cpt.planning import lr_schedules
from titan_cpt.planning.memory import Footprint

BYTES_PER_SAVED_PARAMETER = 12  # float32 weight and AdamW's two moments


@dataclass(frozen=True)
class StageCheckpoint:
    """A place in the run where weights can be picked up: a stage of this plan, after so many of its steps."""

    stage: str
    steps_done: int


@dataclass(frozen=True)
class TrainingHistory:
    """What the weights have been trained on, along their lineage.

    Attributes:
        steps: optimizer steps.
        trained: ordinals used up as new data, by source.
        replayed: replay positions used up, by source.
        exposure: exact sequences, replay included, by dataset: the weights of METHOD section 3.
    """

    steps: int
    trained: Mapping[str, int]
    replayed: Mapping[str, int]
    exposure: Mapping[str, Fraction]


@dataclass(frozen=True)
class AdamWHyperparameters:
    """The optimizer's numbers in one stage."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class DatasetUse:
    """What one stage takes of one dataset or source: tokens, those of them that are replay, and epochs if known."""

    tokens: int
    replayed_tokens: int
    epochs: float | None


@dataclass(frozen=True)
class StagePlan:
    """One stage, all numbers worked out.

    Attributes:
        datasets: the names of those that are new here.
        init: `previous` and `stage:` as the Point they mean; `random`, `checkpoint:PATH` and `hf:NAME` as text.
        pre_anneal_step: steps done when the constant phase of an infinite or wsd schedule ends; None without one.
        history: the history of the weights that the stage begins with.
        tree: which sequence comes when.
        shares: exact share of each dataset in the stage's sequences, replay included.
        final_window: steps done at which the paper's final loss is sampled; empty when it is not asked for.
        recipe: what must not change once the stage has begun, by dotted key.
    """

    name: str
    steps: int
    datasets: tuple[str, ...]
    schedule: lr_schedules.Schedule
    init: StageCheckpoint | str
    keep_optimizer: bool
    optimizer: AdamWHyperparameters
    pre_anneal_step: int | None
    history: TrainingHistory
    tree: Tree
    shares: Mapping[str, Fraction]
    use_by_dataset: Mapping[str, DatasetUse]
    use_by_source: Mapping[str, DatasetUse]
    final_window: tuple[int, ...]
    recipe: Mapping[str, Any]

    def lr_at(self, step: int) -> float:
        """The LR of the 0-based step `step` of this stage: eta(step + 1) of METHOD section 2."""
        return lr_schedules.lr_at(self.schedule, step + 1)


@dataclass(frozen=True)
class Plan:
    """The whole run on a given number of ranks.

    Attributes:
        parallel_dims: how the ranks share the work.
        footprint: what that costs each of them.
        gradient_accumulation_steps: local batches of one data-parallel rank in one step.
        sequences: of every source; None where the data is not there yet.
        base_recipe: what must never change in a run, by dotted key.
        notes: doubts a user should hear before any money is spent.
    """

    name: str
    spec: ModelSpec
    stages: tuple[StagePlan, ...]
    seed: int
    seq_len: int
    global_batch_size: int
    local_batch_size: int
    parallel_dims: ParallelDims
    footprint: Footprint
    gradient_accumulation_steps: int
    sequences: Mapping[str, int | None]
    base_recipe: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.parallel_dims.world_size

    @property
    def data_parallel(self) -> int:
        """Ranks that read different sequences."""
        return self.parallel_dims.data_parallel

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        return self.global_batch_size * self.seq_len

    @property
    def fingerprint(self) -> str:
        """Eight hexadecimal digits of a hash over the recipe: equal where the same steps would be taken."""
        return fingerprint(self.recipe_until(len(self.stages) - 1))

    def stage(self, name: str) -> StagePlan:
        """The stage of that name.

        Raises:
            PlanError: there is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise PlanError(f"there is no stage {name!r}; stages are {', '.join(repr(s.name) for s in self.stages)}")

    def steps_before(self, stage: StagePlan) -> int:
        """Steps that the run takes before this stage, in the order in which it takes them."""
        return sum(earlier.steps for earlier in self.stages[: self.stages.index(stage)])

    def forgetting_since(self, stage: StagePlan, dataset: str) -> str | None:
        """The stage whose step 0 shows the loss on `dataset` when the weights had just left it; None if they never did.

        That is the first stage after the last one of the lineage in which the dataset was new. Weights that came
        trained from elsewhere have left everything before their first stage here.
        """
        name = dataset.partition(".")[0]
        if name in stage.datasets:
            return None
        while isinstance(stage.init, StageCheckpoint):
            parent = self.stage(stage.init.stage)
            if name in parent.datasets:
                return stage.name
            stage = parent
        return None if stage.init == "random" else stage.name

    def recipe_until(self, index: int) -> dict[str, Any]:
        """The recipe of the run up to and with stage `index`, flat, by dotted key."""
        stages = self.stages[: index + 1]
        recipe = {**self.base_recipe, "stages": [stage.name for stage in stages]}
        for stage in stages:
            recipe |= {f"stages.{stage.name}.{key}": value for key, value in stage.recipe.items()}
        return recipe

    def batch(self, stage: StagePlan, step: int) -> list[Draw]:
        """The sequences of the 0-based global batch `step` of a stage, in batch order.

        Raises:
            PlanError: no such step, or an order that is only known once the data is there.
        """
        if not 0 <= step < stage.steps:
            raise PlanError(f"stages.{stage.name}: has steps 0 to {stage.steps - 1}, got {step}")
        unknown = [leaf.source for leaf in leaves(stage.tree) if leaf.reshuffle_key and leaf.seen is None]
        if unknown:
            raise PlanError(
                f"stages.{stage.name}: reshuffled replay of {unknown[0]!r} is only known with its data there"
            )
        return draws(stage.tree, step * self.global_batch_size, (step + 1) * self.global_batch_size)

    def disk_bytes(self, kept_checkpoints: int) -> int:
        """Most bytes of checkpoints that lie on disk at once: kept ones, ends, pre-anneal points, one being written."""
        points = len(self.stages) + sum(stage.pre_anneal_step is not None for stage in self.stages)
        return (kept_checkpoints + points + 1) * self.spec.parameters * BYTES_PER_SAVED_PARAMETER
