"""The version of titan_cpt: of the installed package, or of a checkout as it is now.

setuptools-scm computes the version from git when a package is built. The metadata of an editable installation is that
of the day of the installation, so a checkout asks git.
"""

from __future__ import annotations

import re
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_DESCRIBED = re.compile(r"v?(?P<tag>\d+(?:\.\d+)*)-(?P<distance>\d+)-g(?P<commit>[0-9a-f]+)")
_FIRST = "0.1.0"  # the version that a repository without tags leads to, as for setuptools-scm


@cache
def own_version() -> str:
    """The version, by PEP 440: "0.2.0" for a release, otherwise such as "0.2.1.dev3+g0123abc", of a changed checkout
    "0.2.1.dev3+g0123abc.dirty"; with "+unknown" if git cannot tell the commit of a checkout.
    """
    try:
        installed = metadata.version("titan_cpt")
    except metadata.PackageNotFoundError:  # on PYTHONPATH
        installed = f"{_FIRST}.dev0+unknown"
    if not (_ROOT / ".git").exists():
        return installed
    return _version_of_checkout(_ROOT) or f"{installed.partition('+')[0]}+unknown"


def _version_of_checkout(root: Path) -> str | None:
    described = _git(root, "describe", "--tags", "--long", "--match", "*[0-9]*")
    commit, count = _git(root, "rev-parse", "--short", "HEAD"), _git(root, "rev-list", "--count", "HEAD")
    if not commit or not count:
        return None
    dirty = ".dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else ""
    found = _DESCRIBED.fullmatch(described or "")
    if found is None:
        return f"{_FIRST}.dev{count}+g{commit}{dirty}"
    if found["distance"] == "0" and not dirty:
        return found["tag"]
    *first, last = found["tag"].split(".")
    return f"{'.'.join([*first, str(int(last) + 1)])}.dev{found['distance']}+g{commit}{dirty}"


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints; None if git is missing, fails (no commit yet, a folder of another user) or hangs."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
