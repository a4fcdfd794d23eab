"""From a shape to the model of its family."""

from titan_cpt.models.gpt_neox import GPTNeoX
from titan_cpt.models.llama import Llama
from titan_cpt.models.shapes import GPTNeoXShape, LlamaShape, ModelShape

LanguageModel = GPTNeoX | Llama
"""A model of any family: `shape`, `embedding`, `blocks`, `final_norm`, `head` and `init_weights`."""


def build_model(shape: ModelShape) -> LanguageModel:
    """The model, its weights still meaningless."""
    if isinstance(shape, GPTNeoXShape):
        return GPTNeoX(shape)
    assert isinstance(shape, LlamaShape), f"no model for {type(shape).__name__}"
    return Llama(shape)
