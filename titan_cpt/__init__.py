"""Continual pre-training of language models in native PyTorch. The names below are the Python API: docs/library.md.

They are imported when they are first used, so that `import titan_cpt` and the command line start at once.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titan_cpt.api import Step, Trainer, evaluate, export, load_config, make_plan, merge, open_checkpoint
    from titan_cpt.errors import TitanError

    __version__: str

__all__ = [
    "Step",
    "TitanError",
    "Trainer",
    "__version__",
    "evaluate",
    "export",
    "load_config",
    "make_plan",
    "merge",
    "open_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from titan_cpt.common.version import own_version

        return own_version()
    if name == "TitanError":
        from titan_cpt.errors import TitanError

        return TitanError
    if name in __all__:
        from titan_cpt import api

        return getattr(api, name)
    raise AttributeError(f"module 'titan_cpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
