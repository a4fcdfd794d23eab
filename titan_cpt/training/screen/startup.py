"""The first lines of a run: versions, host, device, processes, precision, run folder, log file; notes on the device."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from titan_cpt.common.console import RunConsole, Verbosity
from titan_cpt.common.gpus import NVIDIA_DRIVER_FILE
from titan_cpt.common.log_file import LogFile, log_output
from titan_cpt.common.readable import memory
from titan_cpt.common.run_folder import log_path
from titan_cpt.common.text import wrapped
from titan_cpt.config.run_config import settings_that_are_not_defaults
from titan_cpt.config.schema import Config
from titan_cpt.distributed.process_group import ProcessInfo
from titan_cpt.models.common.ops import multiplied_in_float32
from titan_cpt.planning.parallel import parallel_dims_of
from titan_cpt.training.metrics import peak_memory, versions

_LABEL_WIDTH = 11
_CPU_INFO = Path("/proc/cpuinfo")


@contextmanager
def run_console(folder: Path, process: ProcessInfo, verbosity: Verbosity) -> Iterator[RunConsole]:
    """The console of a run, and this rank's log file, which the output and errors of the block go to.

    Args:
        folder: the run's folder, which exists.
    """
    with log_output(log_path(folder, process.rank), _session_header(process)) as (log, stdout):
        if process.rank != 0:
            log.write("".join(f"{line}\n" for line in start_lines(process)))
        yield RunConsole(shown=process.rank == 0, verbosity=verbosity, log=log, file=stdout)


def print_start(console: RunConsole, config: Config, process: ProcessInfo, folder: Path) -> None:
    """Print what trains where; with --verbose also the settings that are not defaults."""
    lines = [*start_lines(process), *_run_lines(config, process, folder, console.log_file)]
    for line in lines:
        console.print_line(line)
    with console.level(Verbosity.VERBOSE):
        console.print_line("settings that are not defaults:")
        for setting in settings_that_are_not_defaults(config):
            console.print_line(f"  {setting}")


def start_lines(process: ProcessInfo) -> list[str]:
    """Versions, host and device of this process."""
    known = versions(process.device)
    job = f", Slurm job {os.environ['SLURM_JOB_ID']}" if os.environ.get("SLURM_JOB_ID") else ""
    return [
        f"titan_cpt {known['titan_cpt']}, torch {known['torch']}{_built_for(known['torch'])}, Python {known['python']}",
        *_labeled("host", f"{socket.gethostname()}, process {os.getpid()}{job}"),
        *_labeled("device", _device(process.device)),
    ]


def _run_lines(config: Config, process: ProcessInfo, folder: Path, log: LogFile | None) -> list[str]:
    return [
        *_labeled("processes", _processes(config, process)),
        *_labeled("precision", _precision(config)),
        *_labeled("run", str(folder)),
        *_labeled("log", "none" if log is None or log.trouble else str(log.path)),
    ]


def rank_lines(process: ProcessInfo) -> list[str]:
    """A line for each rank: host, process, device, memory in use; collective."""
    name = torch.cuda.get_device_name(process.device) if process.device.type == "cuda" else "CPU"
    own = (
        f"rank {process.rank}: {socket.gethostname()}, process {os.getpid()}, "
        f"{process.device} ({name}), {memory(peak_memory()['memory_gib'])} in use"
    )
    lines: list[str | None] = [own]
    if dist.is_initialized():
        lines = [None] * process.world_size
        dist.all_gather_object(lines, own)
    return [line for line in lines if line is not None]


def device_notes(config: Config, device: torch.device) -> Iterator[str]:
    """Why the CPU trains although torch is built for GPUs, and what is slow or emulated on this device."""
    if config.float8.recipe_name is not None and device.type == "cpu":
        yield "float8 is emulated on a CPU: it rounds as on a GPU, but is not faster"
    if device.type == "cpu" and "CUDA_VISIBLE_DEVICES" not in os.environ:
        if NVIDIA_DRIVER_FILE.exists():
            yield (
                "this machine has an NVIDIA driver, but torch cannot use a GPU, so the CPU trains: "
                "`titan-cpt --version` prints why"
            )
        elif torch.version.cuda is not None:
            yield (
                f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, but this machine has no NVIDIA "
                "driver, so the CPU trains. On a cluster, start the run on a node with GPUs; in a container, pass the "
                "GPUs on (docker run --gpus all, apptainer --nv); to train on the CPU, do nothing"
            )
    if multiplied_in_float32(getattr(torch, config.training.mixed_precision_param), device):
        yield (
            "this CPU has no bfloat16 matrix multiplication: products are computed in float32 and rounded; "
            'training.mixed_precision_param = "float32" is faster here and more exact'
        )


def _session_header(process: ProcessInfo) -> str:
    started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    name = Path(sys.argv[0]).name
    command = shlex.join(["titan-cpt" if name == "__main__.py" else name, *sys.argv[1:]])
    return f"=== {started}, rank {process.rank} of {process.world_size}: {command}"


def _built_for(version: str) -> str:
    if torch.version.cuda:
        return f" (CUDA {torch.version.cuda})"
    if torch.version.hip:
        return f" (ROCm {torch.version.hip})"
    return "" if version.endswith("+cpu") else " (for CPUs)"


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        gib = torch.cuda.get_device_properties(device).total_memory / 2**30
        return f"GPU {device.index}: {torch.cuda.get_device_name(device)}, {memory(gib)}"
    threads = torch.get_num_threads()
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"CPU: {_cpu_name()} ({vectors}), {threads} thread{'s' * (threads > 1)} per process"


def _cpu_name() -> str:
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.machine()


def _processes(config: Config, process: ProcessInfo) -> str:
    if process.world_size == 1:
        return "1"
    each = int(os.environ.get("LOCAL_WORLD_SIZE", process.world_size))
    nodes = max(1, process.world_size // each)
    where = f"{process.world_size:,} on {nodes:,} node{'s' * (nodes > 1)}"
    if process.device.type == "cuda":
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        where += f", a GPU each; NCCL {nccl}"
    else:
        where += "; gloo"
    return f"{where}; {parallel_dims_of(config, process.world_size).describe()}"


def _precision(config: Config) -> str:
    compute = config.training.mixed_precision_param
    text: str = compute
    if compute != "float32":
        text += f" compute, float32 master weights, {config.training.mixed_precision_reduce} gradient reduction"
    if config.float8.recipe_name is not None:
        text += f", float8 ({config.float8.recipe_name})"
    return text + (", torch.compile" if config.compile.enable else "")


def _labeled(label: str, text: str) -> list[str]:
    first, *more = wrapped(f"{label:<{_LABEL_WIDTH}}{text}", 80)
    return [first, *(f"{'':{_LABEL_WIDTH - 2}}{line}" for line in more)]
