"""Which weights get gradients, and what is saved for the backward pass then."""

import pytest
import torch

from titan_cpt.checkpoint.state_dict import parameters_by_name
from titan_cpt.distributed.activation_checkpoint import apply_ac
from titan_cpt.distributed.options import ParallelOptions
from titan_cpt.distributed.parallelize import freeze
from titan_cpt.models.build import build_model
from titan_cpt.models.gpt_neox.spec import GPTNeoXSpec

SPEC = GPTNeoXSpec(family="gpt_neox", layers=2, width=16, heads=2, mlp_width=32, vocab_size=24, rotary_fraction=0.5)
TOKENS = torch.arange(12).reshape(2, 6)


def new_model(recompute="none"):
    model = build_model(SPEC)
    model.init_weights(0)
    apply_ac(model, ParallelOptions(torch.float32, recompute=recompute))
    return model


def gradients(model):
    """Every weight's gradient of the same loss, by name."""
    model.zero_grad(set_to_none=True)
    model(TOKENS).square().mean().backward()
    return {name: weight.grad for name, weight in parameters_by_name(model).items()}


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_only_trained_weights_get_gradients_and_these_are_the_same(recompute):
    """Under the names of the whole model, whatever wraps the blocks; all weights get gradients again after None."""
    model = new_model(recompute)
    all_gradients = gradients(model)
    trained = {"blocks.1.mlp.down.weight", "head.weight"}
    freeze([model], trained)
    partial = gradients(model)
    freeze([model], None)

    assert {name for name, gradient in partial.items() if gradient is not None} == trained
    assert all(torch.equal(partial[name], all_gradients[name]) for name in trained)
    assert all(torch.equal(gradient, all_gradients[name]) for name, gradient in gradients(model).items())


def test_a_block_below_all_trained_weights_saves_nothing():
    """Not even a checkpoint's input: the head's gradient needs none of it."""
    model = new_model("full")
    freeze([model], {"head.weight"})
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)) or x, lambda x: x):
        model(TOKENS)

    assert saved == [(12, 16)]  # the head's input


def test_compute_copy_and_master_weights_are_frozen_together():
    """Every model that is given, by the names of its weights."""
    models = [new_model(), new_model("full").bfloat16()]
    freeze(models, {"embedding.weight"})

    for model in models:
        assert [name for name, weight in model.named_parameters() if weight.requires_grad] == ["embedding.weight"]
