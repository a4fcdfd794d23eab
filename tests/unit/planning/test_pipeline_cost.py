"""Idle time and activations of every pipeline schedule, compared with a simulation of torch's schedule tables."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, _Action, _ComputationType, get_schedule_class
from torch.testing._internal.distributed.fake_pg import FakeStore

from titan_cpt.distributed.parallel_dims import SCHEDULES, ParallelDims
from titan_cpt.planning.pipeline_cost import bubble, in_flight

SLOTS = {"FORWARD": 1, "FULL_BACKWARD": 2, "BACKWARD_INPUT": 1, "BACKWARD_WEIGHT": 1}


def table(layout: ParallelDims) -> dict[int, list[list[_Action]]]:
    """{rank: its actions in order}; an action is a list, of two passes where torch overlaps forward and backward."""
    if layout.schedule == "1F1B":
        return one_forward_one_backward(layout)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.pp)
    try:
        stages = [
            PipelineStage(nn.Linear(1, 1), n, layout.pipeline_stages, torch.device("cpu")) for n in layout.stages_of(0)
        ]
        kind = get_schedule_class(layout.schedule)
        single = issubclass(kind, PipelineScheduleSingle)
        schedule = kind(stages[0] if single else stages, n_microbatches=layout.microbatches, loss_fn=torch.sum)
        order = schedule._get_pipeline_order() if single else schedule.pipeline_order
    finally:
        dist.destroy_process_group()
    return {
        rank: [list(action.sub_actions or (action,)) for action in actions if action is not None and works(action)]
        for rank, actions in order.items()
    }


def one_forward_one_backward(layout: ParallelDims) -> dict[int, list[list[_Action]]]:
    """1F1B: pp - rank forward passes, then one backward and one forward in turn; torch's table has a wrong entry."""
    order = {}
    for rank in range(layout.pp):
        ahead = min(layout.microbatches, layout.pp - rank)
        forward = [_Action(rank, _ComputationType.FORWARD, part) for part in range(layout.microbatches)]
        backward = [_Action(rank, _ComputationType.FULL_BACKWARD, part) for part in range(layout.microbatches)]
        in_turn = [action for pair in zip(backward, forward[ahead:], strict=False) for action in pair]
        actions = forward[:ahead] + in_turn + backward[layout.microbatches - ahead :]
        order[rank] = [[action] for action in actions]
    return order


def works(action: _Action) -> bool:
    """Whether an action takes time in this simulation; communication does not."""
    return bool(action.sub_actions) or action.computation_type.name in SLOTS


def simulated(layout: ParallelDims) -> tuple[float, list[int]]:
    """Simulate the table: (idle fraction of the step, peak (stage, micro-batch) pairs in memory for each rank)."""
    todo = table(layout)
    clock, ended, busy = dict.fromkeys(todo, 0), {}, dict.fromkeys(todo, 0)
    held, most = {rank: set() for rank in todo}, dict.fromkeys(todo, 0)
    while any(todo.values()):
        before = sum(map(len, todo.values()))
        for rank, actions in todo.items():
            while actions and all(need in ended for action in actions[0] for need in needs(action, layout)):
                together = actions.pop(0)
                since = [ended[need] for action in together for need in needs(action, layout)]
                slots = sum(SLOTS[action.computation_type.name] for action in together)
                clock[rank] = max(clock[rank], *since, 0) + slots
                busy[rank] += slots
                for action in together:
                    kind, part = action.computation_type.name, (action.stage_index, action.microbatch_index)
                    ended[(kind.replace("FULL_BACKWARD", "BACKWARD_INPUT"), *part)] = clock[rank]
                    held[rank] |= {part} if kind == "FORWARD" else set()
                    most[rank] = max(most[rank], len(held[rank]))
                    held[rank] -= {part} if kind in ("FULL_BACKWARD", "BACKWARD_WEIGHT") else set()
        assert sum(map(len, todo.values())) < before, "the ranks wait for each other"
    end = max(clock.values())
    return 1 - max(busy.values()) / end, [most[rank] for rank in sorted(most)]


def needs(action: _Action, layout: ParallelDims) -> list[tuple[str, int, int]]:
    """The actions that must finish before an action can start."""
    stage, part = action.stage_index, action.microbatch_index
    if action.computation_type.name == "FORWARD":
        return [("FORWARD", stage - 1, part)] if stage else []
    if action.computation_type.name == "BACKWARD_WEIGHT":
        return [("BACKWARD_INPUT", stage, part)]
    later = [("BACKWARD_INPUT", stage + 1, part)] if stage + 1 < layout.pipeline_stages else []
    return [("FORWARD", stage, part), *later]


def layouts(schedule: str) -> list[ParallelDims]:
    """Two to five ranks, from the fewest micro-batches that the schedule allows to more than it needs."""
    found = []
    for p in (2, 3, 4, 5):
        fewest = {"1F1B": p, "DualPipeV": 2 * p}.get(schedule, 1)
        for m in range(fewest, 3 * p + 1):
            if not schedule.startswith("Interleaved") or m % max(1, m // p) == 0:
                found.append(ParallelDims(pp=p, schedule=schedule, microbatches=m))
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_bubble_is_that_of_torchs_schedule_tables(schedule: str) -> None:
    """In the simulation every action takes its slots and waits for the actions that it depends on."""
    for layout in layouts(schedule):
        idle, _ = simulated(layout)

        assert bubble(layout) == pytest.approx(idle, abs=1e-12), layout


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_activations_in_flight_are_those_of_torchs_schedule_tables(schedule: str) -> None:
    """On every rank; for ZBVZeroBubble with few micro-batches the result is an upper bound, exact for the peak rank."""
    for layout in layouts(schedule):
        _, held = simulated(layout)
        computed = [in_flight(layout, rank) for rank in range(layout.pp)]

        if schedule == "ZBVZeroBubble" and layout.microbatches < 2 * layout.pp - 1:
            assert max(computed) == max(held), layout
            assert all(bound >= peak for bound, peak in zip(computed, held, strict=True)), layout
        else:
            assert computed == held, layout


def test_the_bubble_by_hand() -> None:
    """Four ranks and micro-batches: 3 of 4 + 3 slots under 1F1B; interleaved 3 of 8 + 3; ZBV 6 of 24 + 6 thirds."""
    shares = {"1F1B": 3 / 7, "Interleaved1F1B": 3 / 11, "ZBVZeroBubble": 6 / 30}

    for schedule, share in shares.items():
        assert bubble(ParallelDims(pp=4, schedule=schedule, microbatches=4)) == pytest.approx(share)
    assert bubble(ParallelDims(dp_shard=4)) == 0
