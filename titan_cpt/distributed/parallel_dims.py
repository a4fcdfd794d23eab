"""How a run is laid over its ranks: degrees, which rank holds what. Pure numbers; layout_rules.py says what is refused.

Ranks are numbered with the tensor-parallel place fastest and the pipeline place slowest, so that the ranks that talk
most sit on one node:

    rank = (((pp * dp_replicate + replica) * dp_shard + shard) * cp + context) * tp + tensor
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ScheduleKind:
    """What matters of a pipeline schedule outside torch.

    Attributes:
        stages_per_rank: consecutive cuts of the model that one rank holds.
        placement: rank r of p holds stages r, r + p, ... ("loop") or r and 2p - 1 - r ("v").
        splits_backward: gradients of inputs and of weights are worked out apart, to fill the bubble.
    """

    stages_per_rank: int
    placement: Literal["loop", "v"]
    splits_backward: bool


SCHEDULES: Mapping[str, ScheduleKind] = {
    "GPipe": ScheduleKind(1, "loop", False),
    "1F1B": ScheduleKind(1, "loop", False),
    "LoopedBFS": ScheduleKind(2, "loop", False),
    "Interleaved1F1B": ScheduleKind(2, "loop", False),
    "InterleavedZeroBubble": ScheduleKind(2, "loop", True),
    "ZBVZeroBubble": ScheduleKind(2, "v", True),
    "DualPipeV": ScheduleKind(2, "v", True),
}


@dataclass(frozen=True)
class RankCoordinates:
    """A rank's coordinates in the layout, each from 0."""

    pipeline: int
    replica: int
    shard: int
    context: int
    tensor: int


@dataclass(frozen=True, kw_only=True)
class ParallelDims:
    """Degrees of every kind of parallelism; their product is the number of ranks.

    Attributes:
        dp_replicate: copies of the sharded model (HSDP).
        dp_shard: data-parallel ranks over which FSDP2 shards, context-parallel ranks besides.
        cp: ranks over which a sequence is split.
        tp: ranks over which matrices are split.
        pp: ranks over which layers are split.
        schedule: a key of `SCHEDULES`; means nothing where pp is 1.
        microbatches: pieces of a local batch that travel through the pipeline, 1 without one.
        reshard_after_forward: parameters are gathered again for the backward pass.
        loss_parallel: logits stay sharded over the vocabulary.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    schedule: str = "1F1B"
    microbatches: int = 1
    reshard_after_forward: bool = True
    loss_parallel: bool = True

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.dp_replicate * self.dp_shard * self.cp * self.tp * self.pp

    @property
    def data_parallel(self) -> int:
        """Ranks that read different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def schedule_kind(self) -> ScheduleKind:
        """The pipeline schedule's kind."""
        return SCHEDULES[self.schedule] if self.pp > 1 else ScheduleKind(1, "loop", False)

    @property
    def pipeline_stages(self) -> int:
        """Cuts of the model over all pipeline ranks."""
        return self.pp * self.schedule_kind.stages_per_rank

    def coordinates(self, rank: int) -> RankCoordinates:
        """Where a rank stands."""
        rank, tensor = divmod(rank, self.tp)
        rank, context = divmod(rank, self.cp)
        rank, shard = divmod(rank, self.dp_shard)
        pipeline, replica = divmod(rank, self.dp_replicate)
        return RankCoordinates(pipeline, replica, shard, context, tensor)

    def data_rank(self, rank: int) -> int:
        """Which share of a global batch a rank reads, 0 to data_parallel - 1."""
        place = self.coordinates(rank)
        return place.replica * self.dp_shard + place.shard

    def stages_of(self, pipeline: int) -> tuple[int, ...]:
        """The stages that a pipeline rank holds, in the order of the model."""
        if self.schedule_kind.placement == "v":
            return (pipeline, self.pipeline_stages - 1 - pipeline)
        return tuple(range(pipeline, self.pipeline_stages, self.pp))

    def layers_of(self, stage: int, layers: int) -> range:
        """The layers of a stage of a model of so many; equal shares, which the rules see to."""
        each = layers // self.pipeline_stages
        return range(stage * each, (stage + 1) * each)

    def describe(self) -> str:
        """Degrees above 1 in words, such as "dp 69 x tp 6 x pp 4 (1F1B)"."""
        names = ("dp_replicate", "dp_shard", "cp", "tp")
        degrees = [f"{name} {getattr(self, name)}" for name in names if getattr(self, name) > 1]
        degrees += [f"pp {self.pp} ({self.schedule})"] if self.pp > 1 else []
        return " x ".join(degrees) or "one process"
