"""Tests on a GPU: what the program says of the device is the device's."""

import math

import pytest
import torch

from titan_cpt.distributed.process_group import init_process_group
from titan_cpt.training.metrics import peak_flops, peak_memory, versions

pytestmark = pytest.mark.gpu


def test_a_run_takes_the_first_gpu():
    """Without torchrun's variables."""
    assert init_process_group().device == torch.device("cuda", 0)


def test_memory_is_the_devices_and_not_the_processes(cuda_device):
    """A tensor of 1 GiB on the device raises it by at least that; 1 GiB on the host does not."""
    before = peak_memory()["memory_gib"]
    on_host = torch.ones(2**28)
    after_host = peak_memory()["memory_gib"]
    on_device = torch.ones(2**28, device=cuda_device)

    assert after_host - before < 0.5
    assert peak_memory()["memory_gib"] - after_host >= 1 - 0.25  # the allocator may have had some free memory
    assert on_host.numel() == on_device.numel()


def test_the_peak_is_unknown_or_above_what_a_product_reaches(cuda_device):
    """A peak below the measured rate would print an MFU above 1."""
    peak = peak_flops(cuda_device)
    left, right = (torch.randn(4096, 4096, device=cuda_device).bfloat16() for _ in range(2))
    for _ in range(3):
        left @ right
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(20):
        left @ right
    end.record()
    end.synchronize()
    reached = 20 * 2 * 4096**3 / (begin.elapsed_time(end) / 1e3)

    assert math.isnan(peak) or peak > reached


def test_the_start_of_a_run_names_the_gpu(cuda_device):
    """In metrics.jsonl and in the manifest."""
    assert versions(cuda_device)["on"] == torch.cuda.get_device_name(cuda_device)
