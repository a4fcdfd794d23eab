"""Checks of torch and the GPUs: the build against the driver, memory, capabilities, other processes."""

from __future__ import annotations

import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from titan_cpt.common import gpus
from titan_cpt.doctor.finding import Finding, note, ok, problem
from titan_cpt.doctor.request import Request
from titan_cpt.errors import how_to_install

_INDEX = "https://download.pytorch.org/whl"
# Oldest driver of each CUDA major version: "CUDA Compatibility" of NVIDIA, table of minor version compatibility.
_OLDEST_DRIVER = {11: (450,), 12: (525,), 13: (580,)}
_DEVICE_FILE = Path("/dev/nvidiactl")
_SMI_TIMEOUT_S = 20
_LITTLE_FREE = 0.9  # of a GPU's memory; less is in use by others


def check_torch(_: Request) -> Iterator[Finding]:
    """torch's version and build, against the NVIDIA driver of this machine."""
    try:
        import torch

        version, cuda, hip = torch.__version__, torch.version.cuda, torch.version.hip
    except ModuleNotFoundError as error:
        yield problem("torch", f"cannot be imported: {error}", how_to_install("torch"))
        return
    except Exception as error:  # whatever a half-installed torch raises
        reason = f"{type(error).__name__}: {error}"
        yield problem("torch", f"cannot be imported: {reason}", "pip install --force-reinstall torch")
        return
    build = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPUs only"
    yield ok("torch", f"{version}, built for {build}")
    yield from driver_findings(cuda, hip, smi())


def driver_findings(cuda: str | None, hip: str | None, nvidia_smi: str) -> Iterator[Finding]:
    """The driver against the CUDA version that torch was built for.

    Args:
        cuda: torch.version.cuda.
        hip: torch.version.hip.
        nvidia_smi: output of `nvidia-smi`; "" if there is none.
    """
    found = re.search(r"Driver Version: *([\d.]+)", nvidia_smi)
    release = found[1] if found else _kernel_module()
    fails = "" if found else " ".join(nvidia_smi.split())
    has_gpu = bool(release) or _DEVICE_FILE.exists()
    if hip:
        yield note("driver", f"ROCm {hip}: titan_cpt was not run on AMD GPUs", "report what you see")
        return
    if fails:
        yield problem("driver", f"nvidia-smi: {fails[:200]}", "load or reinstall the NVIDIA driver (reboot after an "
                      "update), or start the container with --gpus all")  # fmt: skip
        return
    if not has_gpu:
        if cuda:
            remedy = f"on a machine with a GPU install the driver; on a CPU pip install torch --index-url {_INDEX}/cpu"
            yield note("driver", f"no NVIDIA driver, and torch is built for CUDA {cuda}: it runs on the CPU", remedy)
        else:
            yield ok("driver", "no NVIDIA driver, and torch does not need one")
        return
    reinstall = f"pip install --force-reinstall torch --index-url {_INDEX}/{_wheel(release)}"
    if not cuda:
        text = f"driver {release}, but torch is built for CPUs only: it does not use the GPU"
        yield problem("driver", text, reinstall)
        return
    oldest = _OLDEST_DRIVER.get(int(cuda.partition(".")[0]))
    if oldest and release and _numbers(release) < oldest:
        text = f"driver {release} is too old for CUDA {cuda}, which needs {oldest[0]} or newer"
        yield problem("driver", text, f"update the driver, or {reinstall}")
    else:
        yield ok("driver", f"{release or 'release unknown'}, new enough for CUDA {cuda}")


def _wheel(release: str) -> str:
    """Name of the newest of torch's wheels that a driver can run."""
    number = _numbers(release)
    return "cu130" if number >= (580,) else "cu126" if number >= (525,) else "cpu"


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".") if part.isdigit()) or (0,)


def _kernel_module() -> str:
    file = gpus.NVIDIA_DRIVER_FILE
    return file.read_text(encoding="utf-8").strip() if file.exists() else ""


def smi(*arguments: str) -> str:
    """Output of nvidia-smi; "" if it is not on PATH or does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=_SMI_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"no answer within {_SMI_TIMEOUT_S} s"
    except OSError as error:
        return f"cannot be started: {error}"
    return done.stdout or done.stderr


def check_gpus(_: Request) -> Iterator[Finding]:
    """Every GPU that torch can use: memory, precision, other processes; one multiplication on each."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if not usable:
        if caught:
            reason = str(caught[0].message).strip().splitlines()[0]
            yield problem("gpu", f"torch cannot use the GPU: {reason}", "see the line `driver`")
        else:
            yield note("gpu", "none: training uses the CPU", "if this machine has one, see the line `driver`")
        return
    for index in range(torch.cuda.device_count()):
        yield from _gpu(torch, index)
    others = other_processes(smi("--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader"))
    if others:
        yield note("gpu", f"other processes use it: {'; '.join(others[:4])}", "wait for them, or choose other GPUs "
                   "with CUDA_VISIBLE_DEVICES")  # fmt: skip


def _gpu(torch: Any, index: int) -> Iterator[Finding]:
    topic = f"gpu {index}"
    try:
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        matrix = torch.ones(256, 256, device=f"cuda:{index}")
        product = float((matrix @ matrix)[0, 0])
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        yield problem(topic, f"cannot be used: {reason}", "`nvidia-smi` shows its state; choose others with "
                      "CUDA_VISIBLE_DEVICES")  # fmt: skip
        return
    capability = (properties.major, properties.minor)
    text = f"{properties.name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, capability {capability[0]}."
    text += f"{capability[1]}: {precisions(capability)}"
    if product != 256.0:
        yield problem(
            topic, f"{text}; a product of ones is {product} instead of 256", "replace it: it computes wrongly"
        )
    elif free < _LITTLE_FREE * total:
        yield note(topic, text, "another process uses its memory: `nvidia-smi`")
    else:
        yield ok(topic, text)


def precisions(capability: tuple[int, int]) -> str:
    """What a GPU of this compute capability multiplies in: bf16 from 8.0, float8 from 8.9."""
    bf16 = "bf16" if capability >= (8, 0) else "no bf16"
    return f"{bf16}, {'float8' if capability >= (8, 9) else 'no float8'}"


def other_processes(listed: str) -> list[str]:
    """The processes in nvidia-smi's list, each as "name (pid, memory)"."""
    rows = [[part.strip() for part in line.split(",")] for line in listed.splitlines()]
    return [f"{row[1].rpartition('/')[2]} ({row[0]}, {row[2]})" for row in rows if len(row) == 3 and row[0].isdigit()]
