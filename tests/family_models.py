"""Small models of a family for tests: built, with all weights drawn, and as transformers reads them."""

import json

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from titan_cpt.models.build import build_model
from titan_cpt.models.huggingface_config import config_from_spec
from titan_cpt.models.huggingface_weights import from_huggingface, to_huggingface
from titan_cpt.models.registry import named_size

TOKENS_BL = torch.randint(0, 257, (2, 48), generator=torch.Generator().manual_seed(5))


def built(family, size="debug", seed=11, **overrides):
    """A model of a named size with a vocabulary of 257, initialized."""
    model = build_model(named_size(family, size, 257, overrides=overrides))
    model.init_weights(seed)
    return model


def with_all_weights_drawn(model):
    """Biases and norms away from their initial value too, so that a swapped or forgotten one shows."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def in_transformers(model, folder, dtype=torch.float32, **more):
    """The model as transformers reads it from the files of an export; `more` are keys of config.json."""
    config = config_from_spec(model.spec, max_positions=64, dtype="float32")
    (folder / "config.json").write_text(json.dumps(config | more))
    weights = {name: weight.contiguous() for name, weight in to_huggingface(model.state_dict(), model.spec).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def assert_same_logits_and_gradients(model, theirs):
    """Logits and, for a random scalar of them, the gradient of every weight equal transformers' up to 1e-4."""
    logits_BLV, their_logits_BLV = model(TOKENS_BL), theirs(TOKENS_BL).logits
    probe_BLV = torch.randn(logits_BLV.shape, generator=torch.Generator().manual_seed(3))
    (logits_BLV * probe_BLV).mean().backward()
    (their_logits_BLV * probe_BLV).mean().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    their_grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}

    torch.testing.assert_close(logits_BLV, their_logits_BLV, rtol=1e-4, atol=1e-4)
    for name, grad in from_huggingface(their_grads, model.spec).items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-4 * grad.abs().max().item())
