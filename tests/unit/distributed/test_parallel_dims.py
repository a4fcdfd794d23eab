"""Coordinates of ranks and layers of pipeline stages, by hand."""

from __future__ import annotations

from titan_cpt.distributed.parallel_dims import ParallelDims, RankCoordinates


def test_coordinates_of_ranks_by_hand() -> None:
    """The tensor coordinate is fastest, the pipeline coordinate slowest; tensor and context ranks share their data."""
    dims = ParallelDims(dp_replicate=2, dp_shard=3, cp=2, tp=2, pp=2, schedule="1F1B")

    assert dims.coordinates(0) == RankCoordinates(0, 0, 0, 0, 0)
    assert dims.coordinates(1) == RankCoordinates(0, 0, 0, 0, 1)
    assert dims.coordinates(2) == RankCoordinates(0, 0, 0, 1, 0)
    assert dims.coordinates(4) == RankCoordinates(0, 0, 1, 0, 0)
    assert dims.coordinates(12) == RankCoordinates(0, 1, 0, 0, 0)
    assert dims.coordinates(24) == RankCoordinates(1, 0, 0, 0, 0)
    assert [dims.data_rank(rank) for rank in (0, 3, 4, 12, 23, 24)] == [0, 0, 1, 3, 5, 0]


def test_pipeline_stages_by_hand() -> None:
    """Loop schedules place every p-th stage on a rank, V schedules the first and the last."""
    loop = ParallelDims(pp=2, schedule="Interleaved1F1B")
    v = ParallelDims(pp=2, schedule="ZBVZeroBubble")

    assert (loop.pipeline_stages, [loop.stages_of(rank) for rank in range(2)]) == (4, [(0, 2), (1, 3)])
    assert (v.pipeline_stages, [v.stages_of(rank) for rank in range(2)]) == (4, [(0, 3), (1, 2)])
    assert [list(v.layers_of(stage, 8)) for stage in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert (ParallelDims().pipeline_stages, ParallelDims().stages_of(0)) == (1, (0,))


def test_degrees_are_described_in_one_line() -> None:
    """Those above 1, or one process."""
    assert ParallelDims(dp_shard=4, tp=2, pp=2).describe() == "dp_shard 4 x tp 2 x pp 2 (1F1B)"
    assert ParallelDims().describe() == "one process"
