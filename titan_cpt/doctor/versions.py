"""The commit of titan_cpt, versions of torch and of the NVIDIA driver, and the devices that torch can use."""

from __future__ import annotations

import platform
import subprocess
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from titan_cpt.errors import how_to_install


def commit_of(root: Path) -> str:
    """The commit of a checkout and whether files differ from it; "" if titan_cpt is not run from a checkout."""
    if not (root / ".git").exists():
        return ""
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=5)
        changes = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if commit.returncode != 0:
        return ""
    return f" (commit {commit.stdout.strip()}{', with changes' if changes.returncode == 1 else ''})"


def torch_lines() -> Iterator[str]:
    """torch's version and build, the driver, and the devices; one line with the reason if torch cannot be imported."""
    try:
        import torch

        version = torch.__version__
    except ModuleNotFoundError as error:
        lacks = f"not installed; {how_to_install('torch')}" if error.name == "torch" else f"cannot be imported: {error}"
        yield f"torch: {lacks}"
        return
    except Exception as error:  # whatever a half-installed torch raises
        yield f"torch: cannot be imported: {type(error).__name__}: {error}"
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    yield f"torch {version}, " + ("for CPUs only" if not (torch.version.cuda or torch.version.hip) else f"for {build}")
    driver = driver_of(torch)
    if driver:
        yield f"NVIDIA driver {driver}"
    yield f"devices: {devices_of(torch)}"


def driver_of(torch: ModuleType) -> str:
    """The driver's release and the newest CUDA that it supports, as far as they are known; "" without a driver."""
    from titan_cpt.common.gpus import NVIDIA_DRIVER_FILE

    release = NVIDIA_DRIVER_FILE.read_text(encoding="utf-8").strip() if NVIDIA_DRIVER_FILE.exists() else ""
    supported = torch._C._cuda_getDriverVersion() if hasattr(torch._C, "_cuda_getDriverVersion") else 0
    cuda = f"up to CUDA {supported // 1000}.{supported % 1000 // 10}" if supported else ""
    return ", ".join(filter(None, (release, cuda)))


def devices_of(torch: ModuleType) -> str:
    """Names of the GPUs that torch can use, or the CPU and why torch cannot use a GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
        names = Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count() * usable))
    if names:
        return ", ".join(f"{count} x {name}" for name, count in names.items())
    reason = f"; no GPU: {str(caught[0].message).strip().splitlines()[0]}" if caught else ""
    return f"CPU ({platform.machine()}){reason}"
