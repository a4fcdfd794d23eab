"""Import from other trainers: what a reader found becomes a checkpoint with weights and AdamW's state, or a refusal."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.optim import AdamW

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.manifest import has_optimizer_state
from titan_cpt.checkpoint.other_trainers.import_trained import READERS, write_checkpoint
from titan_cpt.checkpoint.other_trainers.trained_checkpoint import AdamWState, StoredTensor, TrainedCheckpoint
from titan_cpt.checkpoint.provenance import tokenizer_path
from titan_cpt.checkpoint.state_dict import load_state, optimizer_tensors
from titan_cpt.checkpoint.tokenizer_check import TrainingTokenizer, tokenizer_of_manifest
from titan_cpt.commands.import_model import TRAINERS
from titan_cpt.errors import CheckpointError
from titan_cpt.models.build import build_model
from titan_cpt.models.registry import named_size, spec_from_recipe
from titan_cpt.training.optimization.adamw import build_adamw

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized"  # DCP in a single process
)
SPEC = named_size("llama", "debug", 257, overrides={"vocab_size": 300, "width": 16, "layers": 1, "mlp_width": 24})


def trained(spec):
    """A model and its AdamW after three steps."""
    model = build_model(spec)
    model.init_weights(3)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    for seed in range(3):
        tokens = torch.randint(0, spec.vocab_size, (2, 9), generator=torch.Generator().manual_seed(seed))
        model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def stored(name, tensor):
    return StoredTensor(f"their.{name}", tuple(tensor.shape), lambda: tensor.detach())


@pytest.fixture(scope="module")
def found():
    """What a reader finds in a checkpoint of another trainer, whose tensors are those of `trained`."""
    model, optimizer = trained(SPEC)
    states = {name: optimizer.state[weight] for name, weight in model.named_parameters()}
    return TrainedCheckpoint(
        trainer="another 1.0",
        spec=SPEC,
        weights={name: stored(name, weight) for name, weight in model.named_parameters()},
        optimizer={
            name: AdamWState(
                exp_avg=stored(f"{name}.m", state["exp_avg"]),
                exp_avg_sq=stored(f"{name}.v", state["exp_avg_sq"]),
                step=int(state["step"]),
            )
            for name, state in states.items()
        },
        step=1200,
        tokens=34_000,
        lr=3e-5,
        settings={"optimizer.beta2": 0.95},
        seq_len=512,
        not_imported=["loader.state: the position in the data"],
    )


def test_a_checkpoint_has_the_weights_the_moments_and_the_step_count(found, tmp_path):
    """A model and an optimizer of ours that load it are those of the other trainer; the manifest says where from."""
    lines = []
    write_checkpoint(found, "there", tmp_path / "out", log=lines.append)
    model = build_model(SPEC)
    optimizer = build_adamw(model, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    load_state(tmp_path / "out", model, optimizer)
    record = manifest.verify(tmp_path / "out")
    mine = optimizer_tensors(model, optimizer)

    assert all(torch.equal(weight, found.weights[name].read()) for name, weight in model.state_dict().items())
    for name, state in found.optimizer.items():
        assert torch.equal(mine[f"state.{name}.exp_avg"], state.exp_avg.read())
        assert torch.equal(mine[f"state.{name}.exp_avg_sq"], state.exp_avg_sq.read())
        assert mine[f"state.{name}.step"] == 3
    assert record["trained_by"] == {
        "trainer": "another 1.0",
        "step": 1200,
        "tokens": 34_000,
        "lr": 3e-5,
        "optimizer": "AdamW",
        "settings": {"optimizer.beta2": 0.95},
    }
    assert spec_from_recipe({k: v for k, v in record["recipe"].items() if k.startswith("model.")}) == SPEC
    assert record["recipe"]["training.seq_len"] == 512
    assert has_optimizer_state(record)
    assert "imported: 12 weights, and AdamW's moments of each, after 3 updates" in lines
    assert "step: 1,200; tokens: 34,000; LR of the last step: 3e-05" in lines
    assert "not imported: loader.state: the position in the data" in lines
    assert 'optimizer_state = "keep"' in lines[-1]
    assert "beta2 = 0.95" in lines[-1]


def test_an_import_without_moments_has_no_state_to_keep(found, tmp_path):
    """Unknown facts are called unknown, and a tokenizer that the user names is recorded."""
    lines = []
    bare = TrainedCheckpoint(trainer="another", spec=SPEC, weights=found.weights, next_lr=2e-4)
    tokenizer = TrainingTokenizer("bytes", "ab" * 32, "cd" * 32)
    write_checkpoint(bare, "there", tmp_path / "out", tokenizer=tokenizer, log=lines.append)
    record = manifest.verify(tmp_path / "out")

    assert not has_optimizer_state(record)
    assert tokenizer_of_manifest(record, tmp_path / "out").ids == "cd" * 32
    assert tokenizer_path(record, tmp_path / "out") == "bytes"
    assert "step: unknown; tokens: unknown; LR of the next step: 0.0002" in lines
    assert "imported: 12 weights, and no optimizer state" in lines
    assert not any("keep" in line or "tokenizer of these weights" in line for line in lines)


def changed(found, kind, name, tensor):
    """`found` with another tensor as a weight or a moment."""
    if kind == "weight":
        return replace(found, weights={**found.weights, name: stored(name, tensor)})
    state = replace(found.optimizer[name], **{kind: stored(f"{name}.{kind}", tensor)})
    return replace(found, optimizer={**found.optimizer, name: state})


HEAD = "head.weight"
NAN = torch.full((300, 16), float("nan"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda it: replace(it, weights={k: v for k, v in it.weights.items() if k != HEAD}), "head.weight: missing"),
        (lambda it: replace(it, foreign=["their.adapter"]), "their.adapter: not a weight of this model"),
        (lambda it: replace(it, weights={**it.weights, "x": it.weights[HEAD]}), "x: not a weight of this model"),
        (lambda it: changed(it, "weight", HEAD, torch.ones(299, 16)), "their.head.weight: has shape [299, 16]"),
        (lambda it: changed(it, "weight", HEAD, NAN), "their.head.weight has values that are NaN or infinite"),
        (lambda it: changed(it, "exp_avg", HEAD, NAN), "their.head.weight.exp_avg has values that are NaN"),
        (lambda it: changed(it, "exp_avg_sq", HEAD, -torch.ones(300, 16)), "exp_avg_sq has values below 0"),
        (
            lambda it: changed(it, "weight", HEAD, torch.full((300, 16), 1e39, dtype=torch.float64)),
            "which float32 cannot hold",
        ),
        (
            lambda it: replace(it, weights={**it.weights, HEAD: replace(it.weights[HEAD], read=lambda: {}["there"])}),
            "their.head.weight: cannot be read: KeyError: 'there'. Copy the checkpoint again",
        ),
        (lambda it: changed(it, "exp_avg", HEAD, torch.ones(16)), "their.head.weight.exp_avg: has shape [16]"),
        (lambda it: changed(it, "weight", HEAD, torch.ones(300, 16).int()), "has the dtype int32"),
        (
            lambda it: replace(it, optimizer={k: v for k, v in it.optimizer.items() if k != HEAD}),
            "optimizer state of head.weight: missing; import with --weights-only",
        ),
        (
            lambda it: replace(it, optimizer={**it.optimizer, HEAD: replace(it.optimizer[HEAD], step=0)}),
            "optimizer state of head.weight: step must be from 1",
        ),
    ],
    ids=[
        "missing",
        "foreign",
        "unknown",
        "shape",
        "nan",
        "nan-moment",
        "negative",
        "float64",
        "unreadable",
        "moment-shape",
        "int",
        "none",
        "step",
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(found, tmp_path, fault, message):
    """The message names the tensor as the other trainer does, and no folder is left."""
    with pytest.raises(CheckpointError) as refused:
        write_checkpoint(fault(found), "there", tmp_path / "out", log=lambda line: None)

    assert message in str(refused.value)
    assert str(refused.value).startswith("there: ")
    assert list(tmp_path.iterdir()) == []


def test_the_command_offers_the_trainers_that_have_a_reader():
    """The list of the command is a second one, because the help of a command imports no torch."""
    assert set(TRAINERS) == set(READERS)


def test_tensors_are_read_one_at_a_time(found, tmp_path):
    """When one is read, none that was read before is in memory any more."""
    alive = []

    def reading(one):
        def read():
            assert not any(ref() is not None for ref in alive)
            copy = one.read().clone()
            alive.append(weakref.ref(copy))
            return copy

        return replace(one, read=read)

    lazy = replace(found, weights={name: reading(one) for name, one in found.weights.items()}, optimizer={})
    write_checkpoint(lazy, "there", tmp_path / "out", log=lambda line: None)

    assert len(alive) == 12
