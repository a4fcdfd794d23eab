"""Building the model of a spec: the family's class, with the spec's parameters."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from titan_cpt.errors import ConfigError
from titan_cpt.models import build
from titan_cpt.models.build import build_model, require_documents
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


def test_a_family_whose_model_has_no_documents_is_refused_with_a_mask(monkeypatch):
    """Of another package, with the signature of older versions; titan_cpt's own families have them."""

    class Older(GPTNeoX):
        def forward(self, tokens_BL, project=None):
            return super().forward(tokens_BL)

    spec = named_size("gpt_neox", "debug", 257)
    require_documents(spec, "training.document_mask")
    require_documents(named_size("llama", "debug", 257), "training.document_mask")
    monkeypatch.setattr(build, "family_module", lambda *_: SimpleNamespace(MODEL=Older))
    with pytest.raises(ConfigError) as refusal:
        require_documents(spec, "stages.b.document_mask")

    assert str(refusal.value).startswith("stages.b.document_mask: the model of family 'gpt_neox' has no documents")
    assert "bounds, positions_BL, starts_BL" in str(refusal.value)
