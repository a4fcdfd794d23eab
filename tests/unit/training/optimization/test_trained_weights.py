"""Parts of the weights under the optimizer: torch.optim.AdamW with parameter groups, and by hand, as references."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from titan_cpt.checkpoint.state_dict import optimizer_tensors, parameters_by_name
from titan_cpt.common.weights.partition import make_partition
from titan_cpt.models.build import build_model
from titan_cpt.models.gpt_neox.spec import GPTNeoXSpec
from titan_cpt.planning.plan import MuonHyperparameters, OptimizerHyperparameters
from titan_cpt.training.optimization.adamw import build_adamw, set_hyperparameters
from titan_cpt.training.optimization.muon import Muon
from titan_cpt.training.optimization.trained_weights import TrainedWeights
from titan_cpt.training.optimization.update import UpdateGuard, clip_grad_norm, set_lr

SPEC = GPTNeoXSpec(family="gpt_neox", layers=3, width=16, heads=2, mlp_width=32, vocab_size=24, rotary_fraction=0.5)
B = 17  # first new row
NUMBERS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
MUON = MuonHyperparameters(momentum=0.9, nesterov=True, ns_steps=5, adjust_lr="match_rms_adamw")


def new_model(seed=0):
    model = build_model(SPEC)
    model.init_weights(seed)
    return model


def sizes(model):
    return {name: tuple(weight.shape) for name, weight in parameters_by_name(model).items()}


def stage_of(model, muon=None, *, trainable=None, lr_scale=None):
    """What `TrainedWeights.use` reads of a stage's plan."""
    given = make_partition(sizes(model), trainable=trainable, lr_scale=lr_scale, first_new_row=B)
    hyperparameters = OptimizerHyperparameters(muon=muon, **NUMBERS)
    return SimpleNamespace(partition=None if given.is_trivial else given, optimizer=hyperparameters)


def put_gradients(model, step):
    """Gradients that depend on the weights and on the step, as those of a loss do."""
    generator = torch.Generator().manual_seed(step)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator) + weight.detach()


def train(model, optimizer, trained, *, steps, first=0, lr=1e-2, max_norm=1e9):
    """Steps as the training loop takes them; returns the gradient norms."""
    norms = []
    for step in range(first, first + steps):
        put_gradients(model, step)
        set_lr(optimizer, lr)
        trained.prepare_gradients()
        norms.append(clip_grad_norm(model, max_norm).item())
        optimizer.step()
        optimizer.zero_grad()
        trained.clear_gradients()
    return norms


def ready(model, stage, optimizer=None):
    """An optimizer that trains what the stage trains."""
    optimizer = optimizer or build_adamw(model, lr=0.0, **NUMBERS)
    trained = TrainedWeights(model, optimizer)
    trained.use(stage)
    set_hyperparameters(optimizer, **NUMBERS)
    return optimizer, trained


def test_only_new_rows_are_trained_as_torch_trains_a_matrix_of_these_rows():
    """Old rows stay bit-equal in spite of weight decay, and the new ones get AdamW's numbers for a matrix of them."""
    model = new_model()
    before = copy.deepcopy(model)
    rows = nn.Parameter(model.embedding.weight[B:].detach().clone())
    reference = torch.optim.AdamW([rows], lr=1e-2, **NUMBERS)
    optimizer, trained = ready(model, stage_of(model, trainable=["embedding.new"]))

    train(model, optimizer, trained, steps=4)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        gradient = torch.randn(model.embedding.weight.shape, generator=generator)
        rows.grad = gradient[B:] + rows.detach()
        reference.step()

    assert torch.equal(model.embedding.weight[:B], before.embedding.weight[:B])
    torch.testing.assert_close(model.embedding.weight[B:].detach(), rows.detach(), rtol=1e-6, atol=1e-8)
    others = [name for name in sizes(model) if name != "embedding.weight"]
    assert all(torch.equal(parameters_by_name(model)[n], parameters_by_name(before)[n]) for n in others)


def test_the_first_step_of_a_new_row_by_hand():
    """AdamW's first step: p (1 - lr scale decay) - lr scale g / (|g| + eps), here with scale 3."""
    model = new_model()
    old = model.head.weight.detach().clone()
    optimizer, trained = ready(model, stage_of(model, trainable=["head.new"], lr_scale={"head.new": 3.0}))
    put_gradients(model, 0)
    gradient = model.head.weight.grad[B].clone()
    train(model, optimizer, trained, steps=1, lr=1e-3)

    expected = old[B] * (1 - 3e-3 * 0.1) - 3e-3 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(model.head.weight[B].detach(), expected, rtol=1e-5, atol=1e-7)


def test_factors_are_those_of_torchs_parameter_groups():
    """Every weight trained, with four factors, both parts of the embedding with other ones: torch's groups, bit-equal
    apart from the rows, which torch has as two parameters."""
    model = new_model()
    other = copy.deepcopy(model)
    scales = {"embedding": 0.1, "embedding.new": 10.0, "blocks.0-1": 0.5, "blocks.1.mlp": 2.0}
    optimizer, trained = ready(model, stage_of(model, lr_scale=scales))

    def factor(name):
        if name.startswith("blocks.1.mlp."):
            return 2.0
        return 0.5 if name.startswith(("blocks.0", "blocks.1")) else 1.0

    named = {name: weight for name, weight in parameters_by_name(other).items() if name != "embedding.weight"}
    old, new = (nn.Parameter(part.detach().clone()) for part in other.embedding.weight.split([B, SPEC.vocab_size - B]))
    groups = [
        {"params": [weight], "lr": 1e-2 * factor(name), "weight_decay": 0.1 if weight.ndim > 1 else 0.0}
        for name, weight in named.items()
    ]
    groups += [{"params": [old], "lr": 1e-3}, {"params": [new], "lr": 0.1}]
    reference = torch.optim.AdamW(groups, fused=True, **NUMBERS)

    train(model, optimizer, trained, steps=3)
    for step in range(3):
        other.embedding.weight.data = torch.cat([old.detach(), new.detach()])
        put_gradients(other, step)
        old.grad, new.grad = (part.clone() for part in other.embedding.weight.grad.split([B, SPEC.vocab_size - B]))
        reference.step()

    for name, weight in named.items():
        assert torch.equal(parameters_by_name(model)[name], weight), name
    assert torch.equal(model.embedding.weight, torch.cat([old, new]))


def test_muon_trains_only_what_is_trainable_with_its_factor():
    """torch.optim.Muon over the matrices of block 0 with its factor; other blocks stay bit-equal."""
    model = new_model()
    other = copy.deepcopy(model)
    stage = stage_of(model, MUON, trainable=["blocks.0-1"], lr_scale={"blocks.0": 0.5, "blocks.1.mlp": 2.0})
    optimizer, trained = ready(model, stage, Muon(model, lr=0.0, **NUMBERS))
    train(model, optimizer, trained, steps=3)

    matrices = {name: w for name, w in parameters_by_name(other).items() if name.startswith("blocks.") and w.ndim == 2}
    groups = []
    for name, weight in matrices.items():
        factor = 0.5 if name.startswith("blocks.0") else 2.0 if name.startswith("blocks.1.mlp.") else 1.0
        if not name.startswith("blocks.2"):
            groups.append({"params": [weight], "lr": 1e-2 * factor})
    reference = torch.optim.Muon(
        groups, weight_decay=0.1, momentum=0.9, nesterov=True, ns_steps=5, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(3):
        put_gradients(other, step)
        for weight in other.parameters():
            if not any(weight is each for group in groups for each in group["params"]):
                weight.grad = None
        reference.step()

    for name, weight in matrices.items():
        assert torch.equal(parameters_by_name(model)[name], weight), name
    assert torch.equal(model.embedding.weight, other.embedding.weight)


def test_the_norm_counts_trained_rows_and_weights_only():
    """The norm is that of the gradients of new rows and of block 1, and clipping scales these."""
    model = new_model()
    optimizer, trained = ready(model, stage_of(model, trainable=["embedding.new", "blocks.1"]))
    put_gradients(model, 0)
    kept = [weight.grad for name, weight in parameters_by_name(model).items() if name.startswith("blocks.1.")]
    kept.append(model.embedding.weight.grad[B:])
    expected = torch.stack([gradient.norm() for gradient in kept]).norm().item()

    assert train(model, optimizer, trained, steps=1) == pytest.approx([expected], rel=1e-6)


def test_a_bad_step_changes_no_row_no_moment_and_no_step_count():
    model = new_model()
    optimizer, trained = ready(model, stage_of(model, trainable=["embedding.new", "final_norm"]))
    guard = UpdateGuard(optimizer)
    train(model, optimizer, trained, steps=1)
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer_tensors(model, optimizer))
    put_gradients(model, 1)
    trained.prepare_gradients()
    guard.observe(torch.tensor(torch.nan), clip_grad_norm(model, 1.0))
    optimizer.step()

    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    after = optimizer_tensors(model, optimizer)
    assert all(torch.equal(after[key], state[key]) for key in state)


def test_a_checkpoint_has_moments_with_the_shape_of_the_weight_and_none_of_frozen_weights():
    model = new_model()
    optimizer, trained = ready(model, stage_of(model, trainable=["embedding.new", "final_norm.weight"]))
    train(model, optimizer, trained, steps=2)
    tensors = optimizer_tensors(model, optimizer)

    names = ["embedding.weight", "final_norm.weight"]
    assert sorted(tensors) == sorted(
        f"state.{name}.{key}" for name in names for key in ("exp_avg", "exp_avg_sq", "step")
    )
    moment = tensors["state.embedding.weight.exp_avg"]
    assert moment.shape == model.embedding.weight.shape
    assert torch.count_nonzero(moment[:B]) == 0
    assert torch.count_nonzero(moment[B:]) == moment[B:].numel()
    assert tensors["state.embedding.weight.step"] == 2
    in_memory = sum(value.numel() for state in optimizer.state.values() for value in state.values())
    assert in_memory == 2 * ((SPEC.vocab_size - B) * SPEC.width + SPEC.width) + 2


@pytest.mark.parametrize("muon", [None, MUON])
def test_without_parts_the_tensors_of_a_checkpoint_are_those_that_torch_names(muon):
    """The same names in the same order, and the optimizer's own tensors, as torch's get_optimizer_state_dict."""
    model = new_model()
    optimizer = build_adamw(model, lr=0.0, **NUMBERS) if muon is None else Muon(model, lr=0.0, **NUMBERS)
    ready(model, stage_of(model, muon), optimizer)
    put_gradients(model, 0)
    optimizer.step()
    theirs = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    theirs = {name: value for name, value in theirs.items() if isinstance(value, torch.Tensor)}
    ours = optimizer_tensors(model, optimizer)

    assert list(ours) == list(theirs)
    assert all(ours[name] is value for name, value in theirs.items())


def test_without_parts_again_all_groups_are_as_they_were():
    """After a stage that trains parts, the groups of one that trains everything are those of a new optimizer."""
    model = new_model()
    fresh = build_adamw(model, lr=0.0, **NUMBERS)
    optimizer, trained = ready(model, stage_of(model, trainable=["embedding.new"]))
    the_list = optimizer.param_groups
    trained.use(stage_of(model))
    set_hyperparameters(optimizer, **NUMBERS)
    set_lr(optimizer, 0.0)

    assert optimizer.param_groups is the_list
    assert not trained.is_partial
    for group, expected in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        assert [id(p) for p in group.pop("params")] == [id(p) for p in expected.pop("params")]
        assert group == expected
