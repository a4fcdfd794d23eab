"""The version of titan_cpt."""

from __future__ import annotations

from importlib import metadata


def own_version() -> str:
    """The version of the installed package; "not installed" for a checkout on PYTHONPATH."""
    try:
        return metadata.version("titan_cpt")
    except metadata.PackageNotFoundError:
        return "not installed"
