"""Parallelism degrees, and the coordinates, data and pipeline stages of each rank. Does not import torch.

planning/parallel_rules.py checks validity. In rank order the tensor-parallel coordinate changes fastest and the
pipeline coordinate slowest, so that the ranks that communicate most are on one node:

    rank = (((pp * dp_replicate + replica) * dp_shard + shard) * cp + context) * tp + tensor
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ScheduleKind:
    """Properties of a pipeline schedule.

    Attributes:
        stages_per_rank: pipeline stages on each rank.
        placement: rank r of p holds pipeline stages r, r + p, ... ("loop"), or r and 2p - 1 - r ("v").
        splits_backward: the backward pass computes input and weight gradients separately, to fill the bubble.
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
    """A rank's coordinate in each dimension, from 0."""

    pipeline: int
    replica: int
    shard: int
    context: int
    tensor: int


@dataclass(frozen=True, kw_only=True)
class ParallelDims:
    """Degree of every kind of parallelism, and related options. The degrees multiply to the world size.

    Attributes:
        dp_replicate: replicas of the sharded model (HSDP).
        dp_shard: data-parallel ranks that FSDP2 shards over; it also shards over context-parallel ranks.
        cp: context-parallel degree: ranks that share each sequence.
        tp: tensor-parallel degree: ranks that share each matrix.
        pp: pipeline-parallel degree: ranks that share the layers.
        schedule: pipeline schedule, a key of `SCHEDULES`; ignored if pp is 1.
        microbatches: micro-batches that a pipeline splits a local batch of [training] into; 1 without a pipeline.
        microbatch_size: sequences of each of them, in every stage of the run.
        reshard_after_forward: FSDP2 frees gathered parameters after the forward pass, and gathers them again for the
            backward pass.
        loss_parallel: keep the logits sharded over the vocabulary (tensor parallelism only).
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    schedule: str = "1F1B"
    microbatches: int = 1
    microbatch_size: int = 1
    reshard_after_forward: bool = True
    loss_parallel: bool = True

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.dp_replicate * self.dp_shard * self.cp * self.tp * self.pp

    @property
    def data_parallel(self) -> int:
        """Number of ranks, or groups of ranks, that read different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def schedule_kind(self) -> ScheduleKind:
        """Properties of the pipeline schedule."""
        return SCHEDULES[self.schedule] if self.pp > 1 else ScheduleKind(1, "loop", False)

    @property
    def pipeline_stages(self) -> int:
        """Number of pipeline stages over all ranks."""
        return self.pp * self.schedule_kind.stages_per_rank

    def coordinates(self, rank: int) -> RankCoordinates:
        """The coordinates of a rank."""
        rank, tensor = divmod(rank, self.tp)
        rank, context = divmod(rank, self.cp)
        rank, shard = divmod(rank, self.dp_shard)
        pipeline, replica = divmod(rank, self.dp_replicate)
        return RankCoordinates(pipeline, replica, shard, context, tensor)

    def data_rank(self, rank: int) -> int:
        """Index of the share of each global batch that a rank reads, 0 to data_parallel - 1."""
        coordinates = self.coordinates(rank)
        return coordinates.replica * self.dp_shard + coordinates.shard

    def stages_of(self, pipeline: int) -> tuple[int, ...]:
        """Indices of the pipeline stages on a pipeline rank, ascending."""
        if self.schedule_kind.placement == "v":
            return (pipeline, self.pipeline_stages - 1 - pipeline)
        return tuple(range(pipeline, self.pipeline_stages, self.pp))

    def layers_of(self, stage: int, layers: int) -> range:
        """Layer indices of a pipeline stage. Layers divide evenly (checked in planning/parallel_rules.py)."""
        each = layers // self.pipeline_stages
        return range(stage * each, (stage + 1) * each)

    def describe(self) -> str:
        """Degrees above 1, such as "dp_replicate 69 x tp 6 x pp 4 (1F1B)"."""
        names = ("dp_replicate", "dp_shard", "cp", "tp")
        degrees = [f"{name} {getattr(self, name)}" for name in names if getattr(self, name) > 1]
        degrees += [f"pp {self.pp} ({self.schedule})"] if self.pp > 1 else []
        return " x ".join(degrees) or "one process"
