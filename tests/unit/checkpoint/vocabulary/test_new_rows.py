"""Rows of new ids: values by hand and by law, the same bits in any sharding, from releases and checkpoints."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from releases import SPECS, release
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from titan_cpt.checkpoint.hf_import import import_released, load_released
from titan_cpt.checkpoint.hf_release import open_released
from titan_cpt.checkpoint.vocabulary import new_rows
from titan_cpt.checkpoint.vocabulary.model_rows import NewValues
from titan_cpt.checkpoint.vocabulary.new_rows import (
    ComputedRows,
    NewRows,
    load_vocabulary,
    read_checkpoint,
    require_old_rows,
)
from titan_cpt.common.weights.named_weights import NamedWeights
from titan_cpt.errors import CheckpointError
from titan_cpt.models.build import build_model
from titan_cpt.models.registry import named_size

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized"  # DCP in a single process
)
OLD = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0], [7.0, -1.0]])
PIECES = {4: (1, 0), 5: (2, 2, 1, 3), 6: ()}
NAN_FROM = 4  # rows of the source from here on are never read


class Vocabulary(nn.Module):
    """The two weights with a row per id."""

    def __init__(self, rows, width, *, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(rows, width)
        self.head = None if tied else nn.Linear(width, rows, bias=False)


def reader(old):
    """Reads rows of a source in which the head is the embedding times -1, and padding rows are NaN."""
    padded = torch.cat((old, torch.full((3, old.shape[1]), torch.nan)))
    return lambda name, rows: padded[rows] if name == "embedding.weight" else -padded[rows]


def loaded(new, rows=9, old=OLD, *, tied=False):
    model = Vocabulary(rows, old.shape[1], tied=tied)
    load_vocabulary(model, reader(old), new)
    return model


def test_each_new_row_is_the_mean_of_its_pieces_and_padding_the_mean_of_the_old_rows():
    """Pieces count as often as they occur; an id without pieces is like padding: (1+3+5+7)/4, (2+6+1-1)/4."""
    model = loaded(NewRows("pieces", 4, 7, seed=0, pieces=PIECES))
    new = [[2.0, 4.0], [5.0, 1.75], [4.0, 2.0], [4.0, 2.0], [4.0, 2.0]]
    assert model.embedding.weight.tolist() == [*OLD.tolist(), *new]
    assert model.head.weight.tolist() == (-model.embedding.weight).tolist()


def test_a_tied_model_has_its_embedding_filled():
    model = loaded(NewRows("mean", 4, 7, seed=0), rows=8, tied=True)
    assert model.embedding.weight.tolist() == [*OLD.tolist(), *[[4.0, 2.0]] * 4]


def test_old_rows_are_those_of_the_source_to_the_bit():
    """Also of a bfloat16 file; new rows are means in float64, rounded once to float32."""
    old = torch.randn(11, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    model = loaded(NewRows("pieces", 11, 12, seed=0, pieces={11: (10, 3, 5)}), rows=12, old=old)
    assert torch.equal(model.embedding.weight[:11], old.float())
    assert torch.equal(model.embedding.weight[11], (old[[3, 5, 10]].double().sum(0) / 3).float())


def test_rows_of_the_source_that_are_replaced_are_replaced_before_new_rows_are_made_of_them():
    """Row 1 of the embedding becomes (0, 8): the mean of the pieces (1, 0) is (0.5, 5), that of all is (3.25, 2.5)."""
    changes = {"embedding.weight": NewValues(torch.tensor([1, 300]), torch.tensor([0.0, 8.0]))}
    model = Vocabulary(8, 2)
    load_vocabulary(model, reader(OLD), NewRows("pieces", 4, 7, seed=0, pieces=PIECES), changes)
    assert model.embedding.weight[[1, 4, 7]].tolist() == [[0.0, 8.0], [0.5, 5.0], [3.25, 2.5]]
    assert model.head.weight[4].tolist() == [-2.0, -4.0]


def test_normal_rows_have_the_mean_and_deviation_of_each_column():
    """Of 4000 rows: the mean within five standard errors, the standard deviation within 6 %; padding is the mean."""
    generator = torch.Generator().manual_seed(3)
    scale, shift = torch.tensor([0.02, 1.0, 5.0, 0.0]), torch.tensor([0.3, -2.0, 100.0, 7.0])
    old = torch.randn(500, 4, generator=generator) * scale + shift
    weight = loaded(NewRows("normal", 500, 4500, seed=1), rows=4501, old=old).embedding.weight.detach()
    new, mean, deviation = weight[500:4500].double(), old.double().mean(0), old.double().std(0, correction=0)
    assert torch.all((new.mean(0) - mean).abs() <= 5 * deviation / 4000**0.5 + 1e-6)
    assert torch.all((new.std(0) - deviation).abs() <= 0.06 * deviation + 1e-6)
    assert torch.allclose(weight[4500].double(), mean, rtol=1e-6)


def test_normal_rows_depend_on_the_seed_the_weight_and_the_id_only():
    old = torch.randn(50, 8, generator=torch.Generator().manual_seed(3))
    first, again, other = (loaded(NewRows("normal", 50, 60, seed=seed), 64, old) for seed in (1, 1, 2))
    weight = first.embedding.weight
    assert torch.equal(weight, again.embedding.weight)
    assert not torch.equal(weight, other.embedding.weight)
    assert not torch.equal(weight[50], weight[51])
    assert not torch.equal(first.head.weight[50:60] + 2 * old.mean(0), weight[50:60])


@given(
    old=st.lists(st.lists(st.integers(-1000, 1000), min_size=2, max_size=2), min_size=1, max_size=12),
    pieces=st.lists(st.lists(st.integers(0, 11), max_size=5), min_size=1, max_size=8),
    block=st.integers(1, 5),
    cut=st.integers(0, 10),
)
@settings(deadline=None, max_examples=60)
def test_rows_are_exact_means_whatever_blocks_are_read(old, pieces, block, cut):
    """Sums of integers are exact in float64, so that the mean is the quotient of two integers, rounded once."""
    count = len(old)
    ids = {count + place: tuple(piece % count for piece in each) for place, each in enumerate(pieces)}
    expected = [
        [sum(old[piece][column] for piece in each or range(count)) / len(each or range(count)) for column in (0, 1)]
        for each in ids.values()
    ]
    table = torch.tensor(old, dtype=torch.float32)
    end = count + len(ids)
    new = NewRows("pieces", count, end, seed=0, pieces=ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(new_rows, "BLOCK_ROWS", block)
        computed = ComputedRows(lambda rows: table[rows], new, "embedding.weight")
        middle = min(count + cut, end)
        parts = [computed.rows(*span) for span in ((count, middle), (middle, end)) if span[0] < span[1]]
        assert torch.cat(parts).tolist() == expected
        assert torch.equal(
            loaded(new, rows=end, old=table).embedding.weight.detach(), torch.cat((table, torch.tensor(expected)))
        )


def test_weights_with_fewer_rows_than_old_ids_are_refused():
    with pytest.raises(CheckpointError, match=r"m: has 3 vocabulary rows, fewer than the 4 ids of tokenizer\.extend"):
        require_old_rows("m", 3, NewRows("mean", 4, 7, seed=0))
    require_old_rows("m", 4, NewRows("mean", 4, 7, seed=0))


@pytest.mark.parametrize(
    ("new", "rows", "tied", "text"),
    [
        (
            NewRows("pieces", 4, 7, seed=0, pieces=PIECES),
            9,
            False,
            "3 new rows of embedding and head, each the mean of its pieces' rows (1 without pieces: the mean of the "
            "old rows); 2 padding rows: the mean of the old rows",
        ),
        (NewRows("mean", 4, 5000, seed=0), 5001, True, "4,996 new rows of the embedding (tied), each the mean of the "),
        (NewRows("normal", 4, 7, seed=0), 7, False, "deviation in each column"),
    ],
)
def test_the_log_says_what_rows_are(new, rows, tied, text):
    said = new.describe(rows, tied=tied)
    assert text in said
    assert ("padding" in said) == (rows > new.end)


@contextmanager
def as_rank(rank, world_size):
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded(spec, layout, rank):
    """A model of the size on the current rank, without values."""
    dims = {name: f"{name} of {rank}" for name in layout}  # torch caches the rank's place in a mesh, by these names
    mesh = init_device_mesh("cpu", tuple(layout.values()), mesh_dim_names=tuple(dims.values()))
    with torch.device("meta"):
        model = build_model(spec)
    if "tp" in layout:
        parallelize_module(model, mesh[dims["tp"]], {"embedding": RowwiseParallel(), "head": ColwiseParallel()})
    if "dp" in layout:
        fully_shard(model, mesh=mesh[dims["dp"]])
    model.to_empty(device="cpu")
    return model


@pytest.mark.parametrize("kind", ["pieces", "mean", "normal"])
@pytest.mark.parametrize("layout", [{"dp": 2}, {"dp": 7}, {"tp": 2}, {"dp": 2, "tp": 2}], ids=str)
def test_every_rank_of_every_layout_has_its_part_of_the_same_bits(kind, layout):
    """FSDP, evenly and not, tensor parallelism, and both: the shards together are the weights of one process."""
    spec = named_size("gpt_neox", "debug", 257, overrides={"vocab_size": 350})
    old = torch.randn(260, spec.width, generator=torch.Generator().manual_seed(0))
    pieces = {number: (number % 260, 3 * number % 260) for number in range(260, 330)}
    new = NewRows(kind, 260, 330, seed=4, pieces=pieces)
    whole = build_model(spec)
    load_vocabulary(whole, reader(old), new)
    size = torch.Size(layout.values()).numel()
    found = {"embedding.weight": [], "head.weight": []}
    for rank in range(size):
        with as_rank(rank, size):
            model = sharded(spec, layout, rank)
            load_vocabulary(model, reader(old), new)
            for name, shards in found.items():
                shards.append(model.get_parameter(name).to_local().detach().clone())
    if layout == {"dp": 2, "tp": 2}:  # of each half that tensor parallelism makes, two parts
        found = {name: [shards[place] for place in (0, 2, 1, 3)] for name, shards in found.items()}
    for name, shards in found.items():
        assert torch.equal(torch.cat(shards), whole.get_parameter(name)), name


@pytest.mark.parametrize("name", SPECS)
def test_a_release_and_its_import_give_the_same_rows(name, tmp_path):
    """The release has 300 rows, of which the tokenizer uses 280; the model has more rows than either."""
    spec = SPECS[name]
    old = release(tmp_path / "released", spec).state_dict()
    import_released(str(tmp_path / "released"), tmp_path / "imported", log=lambda line: None)
    new = NewRows("pieces", 280, 330, seed=0, pieces={number: (number - 280, 7) for number in range(280, 330)})
    larger = open_released(str(tmp_path / "released")).resized(384)
    models = [build_model(larger) for _ in range(2)]
    said = load_released(models[0], str(tmp_path / "released"), larger, new_rows=lambda folder: new)
    load_vocabulary(models[1], read_checkpoint(NamedWeights(tmp_path / "imported")), new)
    assert f"released; 50 new rows of {'the embedding (tied)' if spec.tied else 'embedding and head'}, each" in said
    assert "54 padding rows: the mean of the old rows; " in said
    for weight in ["embedding.weight"] if spec.tied else ["embedding.weight", "head.weight"]:
        first, second = (model.get_parameter(weight) for model in models)
        mean_of_pieces = (old[weight][:50].double() + old[weight][7].double()) / 2
        assert torch.equal(first, second)
        assert torch.equal(first[:280], old[weight][:280])
        assert torch.equal(first[280:330], mean_of_pieces.float())
        assert torch.allclose(first[330:], old[weight][:280].mean(0), atol=1e-7)
