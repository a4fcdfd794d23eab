"""Build the model of a spec."""

import inspect

from titan_cpt.errors import ConfigError
from titan_cpt.models.common.language_model import LanguageModel
from titan_cpt.models.registry import FAMILIES, family_module
from titan_cpt.models.spec import ModelSpec


def build_model(spec: ModelSpec) -> LanguageModel:
    """Build the model with uninitialized weights on torch's default device.

    Raises:
        ConfigError: the spec's family is unknown; or it is of another package, and its parameters are not those that
            its spec counts, from which the plan computes memory and FLOP.
    """
    model: LanguageModel = family_module(spec.family, "model").MODEL(spec)
    if spec.family not in FAMILIES:
        counted, found = spec.parameters, sum(parameter.numel() for parameter in model.parameters())
        if counted != found:
            raise ConfigError(
                f"model.family: the model of {spec.family!r} has {found:,} parameters, its spec counts {counted:,}: "
                "correct block_parameters or final_norm_parameters of the spec"
            )
    return model


def require_documents(spec: ModelSpec, setting: str) -> None:
    """Check that the family's model has a document mask and positions; those of other packages may not.

    Raises:
        ConfigError: it has not; the message begins with `setting`.
    """
    forward = family_module(spec.family, "model").MODEL.forward
    missing = {"starts_BL", "positions_BL", "bounds"} - {*inspect.signature(forward).parameters}
    if missing:
        raise ConfigError(
            f"{setting}: the model of family {spec.family!r} has no documents: its forward lacks the keyword arguments "
            f"{', '.join(sorted(missing))} (docs/library.md). Set {setting} to false, or add them"
        )
