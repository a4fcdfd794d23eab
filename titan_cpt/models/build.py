"""From a shape to the model of its family."""

from titan_cpt.errors import ConfigError
from titan_cpt.models.gpt_neox.model import GPTNeoX
from titan_cpt.models.llama.model import Llama
from titan_cpt.models.spec import GPTNeoXSpec, LlamaSpec, ModelSpec

LanguageModel = GPTNeoX | Llama
"""A model of any family: `shape`, `embedding`, `blocks`, `final_norm`, `head` and `init_weights`."""


def build_model(spec: ModelSpec) -> LanguageModel:
    """The model, its weights still meaningless.

    Raises:
        ConfigError: its family has no model here.
    """
    if isinstance(spec, GPTNeoXSpec):
        return GPTNeoX(spec)
    if isinstance(spec, LlamaSpec):
        return Llama(spec)
    raise ConfigError(f"model.family: {spec.family!r} has no model: build_model in models/families.py would build it")
