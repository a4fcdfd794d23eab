"""Building the model of a spec: the family's class, with the spec's parameters."""

import dataclasses

import pytest
import torch

from titan_cpt.errors import ConfigError
from titan_cpt.models.build import build_model
from titan_cpt.models.gpt_neox.model import GPTNeoX
from titan_cpt.models.llama.model import Llama
from titan_cpt.models.registry import named_size


@pytest.mark.parametrize(("family", "model_class"), [("gpt_neox", GPTNeoX), ("llama", Llama)])
def test_a_spec_is_built_as_its_family(family, model_class):
    """On the default device; an unknown family is refused."""
    spec = named_size(family, "debug", 257)
    with torch.device("meta"):
        model = build_model(spec)

    assert type(model) is model_class
    assert sum(parameter.numel() for parameter in model.parameters()) == spec.parameters
    assert all(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(ConfigError, match="unknown family 'other'"):
        build_model(dataclasses.replace(spec, family="other"))
