"""Rows written into a model, whole, sharded or without the weight."""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from releases import SPECS
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from titan_cpt.checkpoint.vocabulary.model_rows import NewValues, write_rows
from titan_cpt.models.build import build_model

IDS = torch.tensor([0, 149, 226, 240, 263, 299, 500])  # rank 5 has the rows from 226 to 263
CHANGES = {
    "embedding.weight": NewValues(IDS, torch.arange(7.0)[:, None] + torch.arange(64.0)),
    "head.weight": NewValues(IDS, torch.full((64,), 9.0)),
}


@contextmanager
def rank_5_of_8():
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    try:
        yield
    finally:
        dist.destroy_process_group()


def zeroed(model):
    """The fake process group moves no data between ranks, so that weights are set after they are sharded."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    return model


def model():
    return zeroed(build_model(SPECS["llama"]))


def expected():
    """By index; the last id is beyond the weights."""
    state = {name: tensor.clone() for name, tensor in model().state_dict().items()}
    for name, (ids, values) in CHANGES.items():
        state[name][ids[:-1]] = values.expand(7, -1)[:-1]
    return state


def test_rows_of_a_whole_model_are_written():
    """All other weights and rows keep their bits; ids beyond the weight are ignored."""
    changed = model()
    write_rows(changed, CHANGES)

    assert all(torch.equal(tensor, expected()[name]) for name, tensor in changed.state_dict().items())


def test_each_rank_writes_its_shards():
    """FSDP over 4 and TP over 2: rank 5 has a quarter of a half of the rows."""
    sharded = model()
    with rank_5_of_8():
        mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))
        plan = {"embedding": RowwiseParallel(), "head": ColwiseParallel()}
        parallelize_module(sharded, mesh["tp"], plan)
        fully_shard(sharded, mesh=mesh["dp"])
        zeroed(sharded)
        write_rows(sharded, CHANGES)
        embedding, head = sharded.embedding.weight.to_local(), sharded.head.weight.to_local()

    assert torch.equal(embedding, expected()["embedding.weight"][150:][76:114])  # quarters of 150 rows: 38 and a rest
    assert torch.equal(head, expected()["head.weight"][150:][76:114])


def test_a_pipeline_stage_without_the_weight_is_not_changed():
    """The embedding is another rank's."""
    stage = model()
    stage.embedding = None
    write_rows(stage, CHANGES)

    assert torch.equal(stage.head.weight, expected()["head.weight"])
