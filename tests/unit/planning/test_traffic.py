"""Estimated communication of a step, by hand; scripts/scale/traced.py compares it with traced steps."""

from __future__ import annotations

import dataclasses

import pytest

from titan_cpt.distributed.parallel_dims import ParallelDims
from titan_cpt.planning.memory import footprint
from unit.planning.test_memory import SPEC, WORK


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
