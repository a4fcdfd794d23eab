"""Estimated communication of a step, by hand; scripts/scale/traced.py compares it with traced steps."""

from __future__ import annotations

import dataclasses

import pytest

from titan_cpt.distributed.parallel_dims import ParallelDims
from titan_cpt.planning.memory import footprint
from titan_cpt.planning.traffic import traffic
from unit.planning.test_memory import LLAMAS, SPEC, WORK

RESIDUAL = 256 * 128 * 4  # bytes of the residual stream of a micro-batch: tokens x width x float32


def test_fsdp_sends_what_a_ring_sends() -> None:
    """3/4 of the model in float32 on 4 ranks: two all-gathers, one reduce-scatter; head and norm are gathered once."""
    costs = footprint(SPEC, ParallelDims(dp_shard=4), WORK)
    head = SPEC.vocab_size * SPEC.width + 2 * SPEC.width

    assert costs.traffic.fsdp == round(0.75 * 4 * (3 * SPEC.parameters - head))


def test_an_all_gather_in_float8_sends_one_byte_per_element() -> None:
    """Four ranks in bfloat16, resharding: block matrices are gathered twice with 1 byte instead of 2."""
    dims, work = ParallelDims(dp_shard=4), dataclasses.replace(WORK, bytes_per_number=2)
    plain = footprint(SPEC, dims, work)
    cast = footprint(SPEC, dims, dataclasses.replace(work, float8_filter_fqns=("head",)))
    matrices = 4 * (3 * 128 * 128 + 128 * 128 + 2 * 128 * 512)

    assert plain.traffic.fsdp - cast.traffic.fsdp == pytest.approx(2 * 0.75 * matrices, abs=1)
    assert plain.gathered - cast.gathered == 2 * matrices // 4  # two blocks of four are gathered at a time


@pytest.mark.parametrize(
    ("dims", "sent"),
    [
        (ParallelDims(), 0),
        (ParallelDims(dp_shard=4), 3 / 4 / 4 + 3 / 4 / 4),  # a quarter of the matrices: three quarters of each, twice
        (ParallelDims(dp_shard=2, tp=2), 3 / 4 / 4 + 3 / 4 / 4),
        (ParallelDims(dp_replicate=2, dp_shard=2), 1 / 2 / 4 + 3 / 2 / 4),  # halves: one to the owner, three from it
    ],
    ids=str,
)
def test_muon_sends_matrices_to_their_owners_and_results_to_all(dims: ParallelDims, sent: float) -> None:
    """In bfloat16, a mean over the ranks; AdamW sends nothing."""
    matrices = 4 * (3 * 128 * 128 + 128 * 128 + 2 * 128 * 512)

    assert traffic(SPEC, dims, dataclasses.replace(WORK, muon=True), (0,)).optimizer == round(2 * sent * matrices)
    assert traffic(SPEC, dims, WORK, (0,)).optimizer == 0


@pytest.mark.parametrize(("recompute", "per_layer"), [("none", 8), ("full", 12)])
def test_tensor_parallelism_gathers_and_scatters_the_residual_stream(recompute: str, per_layer: int) -> None:
    """On 2 ranks half of it per collective: 4 layers, 2 for the embedding and 2 for the head; 3 local batches."""
    work = dataclasses.replace(WORK, recompute=recompute, accumulation=3)
    pipeline = ParallelDims(tp=2, pp=2)

    assert traffic(SPEC, ParallelDims(tp=2), work, (0,)).tensor == 3 * (4 * per_layer + 4) * RESIDUAL // 2
    assert traffic(SPEC, pipeline, work, (0,)).tensor == 3 * (2 * per_layer + 2) * RESIDUAL // 2
    assert traffic(SPEC, pipeline, work, (1,)).tensor == 3 * (2 * per_layer + 2) * RESIDUAL // 2


@pytest.mark.parametrize(("recompute", "numbers"), [("none", 2), ("full", 3)])
def test_context_parallelism_sends_keys_values_and_their_gradients(recompute: str, numbers: int) -> None:
    """To 2 other ranks: 4 layers x K and V, forward, again if recomputed, and gradients; grouped K and V are half."""
    dims, work = ParallelDims(cp=3), dataclasses.replace(WORK, recompute=recompute)
    expected = 2 * 4 * 2 * numbers * RESIDUAL

    assert traffic(SPEC, dims, work, (0,)).context == expected
    assert traffic(LLAMAS["llama"], dims, work, (0,)).context == expected // 2


@pytest.mark.parametrize(
    ("schedule", "stages", "sends"),
    [
        ("1F1B", (0,), 1),
        ("1F1B", (1,), 1),
        ("Interleaved1F1B", (0, 2), 3),
        ("ZBVZeroBubble", (0, 3), 2),
        ("ZBVZeroBubble", (1, 2), 2),
    ],
)
def test_a_pipeline_sends_the_residual_stream_to_stages_of_other_ranks(
    schedule: str, stages: tuple[int, ...], sends: int
) -> None:
    """Activations to the next stage and gradients to the one before: 2 micro-batches, 3 local batches."""
    dims = ParallelDims(pp=2, schedule=schedule, microbatches=2)
    sent = traffic(SPEC, dims, dataclasses.replace(WORK, accumulation=3), stages)

    assert sent.pipeline == 2 * 3 * sends * RESIDUAL
    assert sent.total == sent.pipeline
