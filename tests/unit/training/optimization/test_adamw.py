"""AdamW by hand, decay by group, new hyperparameters, resetting, the state before the first step."""

import copy

import numpy as np
from small_models import NUMBERS, Small, everything, give_gradients, same_bits
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from titan_cpt.models.gpt_neox.model import GPTNeoX
from titan_cpt.models.registry import named_size
from titan_cpt.training.optimization.adamw import build_adamw, parameter_groups, reset_state, set_hyperparameters
from titan_cpt.training.optimization.update import set_lr


def numpy_adamw(weights, gradients, *, lrs, betas, eps, decay):
    """Loshchilov and Hutter's algorithm 2, in fp64: weights after one step for each gradient."""
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    for t, (gradient, lr) in enumerate(zip(gradients, lrs, strict=True), start=1):
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        ratio = (first / (1 - betas[0] ** t)) / (np.sqrt(second / (1 - betas[1] ** t)) + eps)
        weights = weights - lr * decay * weights - lr * ratio
    return weights


def test_two_steps_are_adamws_by_hand():
    """Each step with its own learning rate; the matrix decays, the vector does not."""
    model = Small()
    expected = {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}
    optimizer = build_adamw(model, lr=123.0, **NUMBERS)
    gradients = {"weight": [], "bias": []}
    for step, lr in enumerate((3e-3, 1e-2)):
        give_gradients(model, step)
        for name, parameter in model.named_parameters():
            gradients[name].append(parameter.grad.double().numpy())
        set_lr(optimizer, lr)
        optimizer.step()

    for name, decay in (("weight", 0.1), ("bias", 0.0)):
        after = numpy_adamw(expected[name], gradients[name], lrs=(3e-3, 1e-2), betas=(0.9, 0.95), eps=1e-8, decay=decay)
        np.testing.assert_allclose(model.get_parameter(name).detach().numpy(), after, rtol=2e-6, atol=1e-7)


def test_embeddings_and_matrices_have_weight_decay_norms_and_biases_have_none():
    """The groups of a GPT-NeoX, by name; every weight is in one of them, once."""
    model = GPTNeoX(named_size("gpt_neox", "debug", 257))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, kept = parameter_groups(model, 0.1)
    decayed_names = {names[parameter] for parameter in decayed["params"]}
    kept_names = {names[parameter] for parameter in kept["params"]}

    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert {"embedding.weight", "head.weight", "blocks.1.attention.qkv.weight"} <= decayed_names
    assert {"blocks.0.attention_norm.weight", "blocks.1.mlp.up.bias", "final_norm.weight"} <= kept_names
    assert len(decayed["params"]) + len(kept["params"]) == len(decayed_names | kept_names) == len(names)


def test_new_hyperparameters_stay_after_an_old_state_is_loaded():
    """Loading puts the old stage's numbers back; `set_hyperparameters` then wins, and vectors still do not decay."""
    old_model, model = Small(), Small()
    old = build_adamw(old_model, lr=1e-2, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.7)
    give_gradients(old_model, 0)
    old.step()
    model.load_state_dict(old_model.state_dict())
    optimizer = build_adamw(model, lr=1e-2, **NUMBERS)
    optimizer.load_state_dict(copy.deepcopy(old.state_dict()))
    loaded = everything(model, optimizer)
    loaded_betas = optimizer.param_groups[0]["betas"]
    set_hyperparameters(optimizer, **NUMBERS)
    set_lr(optimizer, 5e-3)

    assert loaded_betas == (0.5, 0.6)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {(group["lr"], group["betas"], group["eps"]) for group in optimizer.param_groups} == {
        (5e-3, (0.9, 0.95), 1e-8)
    }
    assert same_bits(loaded, everything(model, optimizer))
    assert optimizer.state[model.bias]["step"].item() == 1


def test_a_reset_optimizer_continues_like_a_new_one():
    """Three steps, reset, two steps: the same bits as two steps of an optimizer made at that point."""
    model = Small()
    optimizer = build_adamw(model, lr=1e-2, **NUMBERS)
    for step in range(3):
        give_gradients(model, step)
        optimizer.step()
    new_model = copy.deepcopy(model)
    new = build_adamw(new_model, lr=1e-2, **NUMBERS)
    reset_state(optimizer)
    for step in range(3, 5):
        for each_model, each in ((model, optimizer), (new_model, new)):
            give_gradients(each_model, step)
            each.step()

    assert same_bits(everything(model, optimizer), everything(new_model, new))


def test_a_checkpoint_of_step_0_says_step_0():
    """torch's distributed checkpoint would take a step of its own for an optimizer without state, and count it."""
    model = Small()
    optimizer = build_adamw(model, lr=1e-2, **NUMBERS)
    before = everything(model, optimizer)
    saved = get_optimizer_state_dict(model, optimizer)["state"]

    assert {name: state["step"].item() for name, state in saved.items()} == {"weight": 0.0, "bias": 0.0}
    assert same_bits(before, everything(model, optimizer))
