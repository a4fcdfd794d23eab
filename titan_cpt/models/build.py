"""Build the model of a spec."""

from titan_cpt.models.common.language_model import LanguageModel
from titan_cpt.models.registry import family_module
from titan_cpt.models.spec import ModelSpec


def build_model(spec: ModelSpec) -> LanguageModel:
    """Build the model with uninitialized weights on torch's default device.

    Raises:
        ConfigError: the spec's family is unknown.
    """
    model: LanguageModel = family_module(spec.family, "model").MODEL(spec)
    return model
