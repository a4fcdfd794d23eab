"""What the benchmarks need to know of the device: a GPU if there is one, unless CUDA_VISIBLE_DEVICES is empty."""

from __future__ import annotations

import torch


def device() -> torch.device:
    """The device on which titan_cpt trains here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def one_thread_on_a_cpu() -> None:
    """Benchmarks on a CPU use one thread; on a GPU the host's threads stay as they are."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)


def wait() -> None:
    """Wait until the GPU has finished, before a clock is read; does nothing on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def where() -> str:
    """One line for the top of a table: device and torch."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"On {name}, torch {torch.__version__}."
