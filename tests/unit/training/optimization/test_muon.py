"""Muon bit for bit as torch.optim.Muon, AdamW for the rest as torch's, the guard, changes of the optimizer, state."""

import copy

import pytest
import torch
from small_models import NUMBERS, everything, give_gradients, same_bits
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from titan_cpt.planning.plan import MuonHyperparameters, OptimizerHyperparameters
from titan_cpt.training.optimization.adamw import build_adamw, reset_state, set_hyperparameters
from titan_cpt.training.optimization.muon import Muon, use_optimizer
from titan_cpt.training.optimization.update import UpdateGuard, clip_grad_norm, set_lr

MUON = MuonHyperparameters(momentum=0.95, nesterov=True, ns_steps=5, adjust_lr="match_rms_adamw")
SHAPES = {"square": (8, 8), "wide": (33, 77), "tall": (77, 33), "row": (1, 9), "column": (9, 1), "odd": (130, 257)}


class Model(nn.Module):
    """A block of matrices and a bias, an embedding and a norm."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        draw = {name: torch.randn(shape, generator=generator) for name, shape in {**SHAPES, "bias": (8,)}.items()}
        self.blocks = nn.ParameterDict(draw)
        self.embedding = nn.Parameter(torch.randn(5, 4, generator=generator))
        self.norm = nn.Parameter(torch.randn(4, generator=generator))

    @property
    def matrices(self):
        return [self.blocks[name] for name in SHAPES]


def muon_of(model, given=MUON, lr=1e-2):
    optimizer = Muon(model, lr=lr, **NUMBERS)
    optimizer.use(given)
    return optimizer


def torchs(model, given):
    """torch's two optimizers over the same groups."""
    muon = torch.optim.Muon(
        model.matrices,
        lr=1e-2,
        weight_decay=NUMBERS["weight_decay"],
        momentum=given.momentum,
        nesterov=given.nesterov,
        ns_steps=given.ns_steps,
        adjust_lr_fn=given.adjust_lr,
    )
    groups = [{"params": [model.embedding]}, {"params": [model.blocks["bias"], model.norm], "weight_decay": 0.0}]
    return muon, torch.optim.AdamW(groups, lr=1e-2, fused=True, **NUMBERS)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(
    "given",
    [
        MUON,
        MuonHyperparameters(momentum=0.9, nesterov=False, ns_steps=3, adjust_lr="original"),
        MuonHyperparameters(momentum=0.0, nesterov=True, ns_steps=6, adjust_lr="original"),
    ],
    ids=["defaults", "without nesterov", "without momentum"],
)
def test_steps_are_those_of_torch_bit_for_bit(given, on_device):
    """Six steps with changing learning rates and weight decay: weights, momentum, moments and step counts."""
    model, other = Model(), Model()
    optimizer = muon_of(model, given)
    optimizer.selects_on_device = on_device
    guard = UpdateGuard(optimizer)
    muon, adamw = torchs(other, given)
    for step in range(6):
        for each in (model, other):
            give_gradients(each, step)
        clip_grad_norm(model, 1.0)
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        set_lr(optimizer, 1e-2 / (1 + step))
        set_lr(muon, 1e-2 / (1 + step))
        set_lr(adamw, 1e-2 / (1 + step))
        guard.observe(torch.tensor(1.0), torch.tensor(1.0))
        optimizer.step()
        muon.step()
        adamw.step()

    states = [{**muon.state, **adamw.state}[parameter] for parameter in other.parameters()]
    for parameter, theirs, state in zip(model.parameters(), other.parameters(), states, strict=True):
        assert torch.equal(parameter, theirs)
        assert optimizer.state[parameter].keys() == state.keys()
        assert same_bits(optimizer.state[parameter].values(), state.values())


def test_a_finite_gradient_whose_square_overflows_still_moves_a_weight():
    """torch.optim.Muon's update is 0 after a gradient of 1e20, and the weights only decay."""
    model, scaled = Model(), Model()
    give_gradients(model, 0)
    give_gradients(scaled, 0)
    for parameter in scaled.matrices:
        parameter.grad *= 2.0**66
    muon_of(model).step()
    muon_of(scaled).step()

    assert all(parameter.grad.isfinite().all() for parameter in scaled.matrices)
    assert same_bits(model.matrices, scaled.matrices)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_nothing_moves_from_a_bad_step_on_until_the_reset(fault, on_device):
    """Weights, momentum, moments and step counts keep their bits, through good steps too; also as a GPU does it."""
    model = Model()
    optimizer = muon_of(model)
    optimizer.selects_on_device = on_device
    guard = UpdateGuard(optimizer)
    give_gradients(model, 0)
    optimizer.step()
    before = everything(model, optimizer)
    for step, poison in ((1, fault), (2, None)):
        give_gradients(model, step)
        if poison is not None:
            model.blocks["wide"].grad[2, 3] = poison
        guard.observe(torch.tensor(1.0), clip_grad_norm(model, 1.0))
        optimizer.step()

    assert bool(guard.halted)
    assert same_bits(before, everything(model, optimizer))
    guard.reset()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, everything(model, optimizer), strict=True))


def test_as_adamw_it_is_the_plain_adamw_bit_for_bit():
    """A stage with AdamW in a run that has Muon elsewhere."""
    model, other = Model(), Model()
    optimizer, plain = muon_of(model, None), build_adamw(other, lr=1e-2, **NUMBERS)
    for step in range(3):
        for each, its in ((model, optimizer), (other, plain)):
            give_gradients(each, step)
            its.step()

    assert same_bits(everything(model, optimizer), everything(other, plain))


def test_a_change_of_the_optimizer_begins_the_matrices_state_anew_and_keeps_the_rest():
    """AdamW -> Muon -> AdamW: state of the other kind is gone; no change, no new state."""
    model = Model()
    optimizer = muon_of(model, None)
    give_gradients(model, 0)
    optimizer.step()
    of_norm = [value.clone() for value in optimizer.state[model.norm].values()]
    moments = optimizer.state[model.blocks["odd"]]["exp_avg"]
    optimizer.use(None)
    assert optimizer.state[model.blocks["odd"]]["exp_avg"] is moments
    optimizer.use(MUON)
    assert {name: value.count_nonzero().item() for name, value in optimizer.state[model.blocks["odd"]].items()} == {
        "momentum_buffer": 0
    }
    optimizer.step()
    optimizer.use(None)

    assert {name: value.count_nonzero().item() for name, value in optimizer.state[model.blocks["odd"]].items()} == {
        "step": 0,
        "exp_avg": 0,
        "exp_avg_sq": 0,
    }
    assert optimizer.state[model.norm]["step"].item() == 2
    assert not same_bits(of_norm, optimizer.state[model.norm].values())


def test_a_state_dict_brings_the_momentum_back_and_the_new_hyperparameters_stay():
    """As a checkpoint is read: the same steps follow, with the stage's own numbers."""
    model = Model()
    optimizer = muon_of(model)
    give_gradients(model, 0)
    optimizer.step()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    other = copy.deepcopy(model)
    read = muon_of(other, MuonHyperparameters(0.5, nesterov=False, ns_steps=2, adjust_lr="original"))
    own = get_optimizer_state_dict(other, read, options=options)
    tensors = {name: value for name, value in saved.items() if isinstance(value, torch.Tensor)}
    set_optimizer_state_dict(other, read, {**own, **tensors}, options=options)
    loaded = everything(other, read)
    momentum = read.param_groups[0]["momentum"]
    use_optimizer(read, OptimizerHyperparameters((0.9, 0.95), 1e-8, 0.1, MUON))
    set_hyperparameters(read, **NUMBERS)
    set_lr(read, 1e-2)
    for each, its in ((model, optimizer), (other, read)):
        give_gradients(each, 1)
        its.step()

    assert momentum == 0.5
    assert len(loaded) == len(everything(model, optimizer))
    assert same_bits(everything(model, optimizer), everything(other, read))


def test_a_reset_sets_the_momentum_to_zero():
    """The next steps are those of a new optimizer."""
    model = Model()
    optimizer = muon_of(model)
    give_gradients(model, 0)
    optimizer.step()
    other = copy.deepcopy(model)
    new = muon_of(other)
    reset_state(optimizer)
    for each, its in ((model, optimizer), (other, new)):
        give_gradients(each, 1)
        its.step()

    assert same_bits(everything(model, optimizer), everything(other, new))
