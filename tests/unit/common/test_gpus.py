"""Peaks by the names that drivers give; the figures from the data sheets, half of those with sparsity."""

import math

import pytest

from titan_cpt.common.gpus import peak_flops_of


@pytest.mark.parametrize(
    ("name", "with_sparsity"),
    [
        ("NVIDIA A100-SXM4-80GB", 624),
        ("NVIDIA A100-PCIE-40GB", 624),
        ("NVIDIA A100 80GB PCIe", 624),
        ("NVIDIA H100 80GB HBM3", 1979),
        ("NVIDIA H100 PCIe", 1513),
        ("NVIDIA H100 NVL", 1671),
        ("NVIDIA H200", 1979),
        ("NVIDIA H200 NVL", 1671),
        ("NVIDIA GH200 480GB", 1979),
        ("NVIDIA B200", 4500),
        ("NVIDIA GB200", 5000),
        ("NVIDIA L40S", 724.1),
        ("NVIDIA GeForce RTX 4090", 330.4),
        ("NVIDIA GeForce RTX 5090", 419),
        ("AMD Instinct MI300X", 2614.9),
    ],
)
def test_a_listed_gpu_has_half_of_its_peak_with_sparsity(name, with_sparsity):
    """In TFLOP/s, within the rounding of the data sheets."""
    assert peak_flops_of(name) == pytest.approx(with_sparsity / 2 * 1e12, rel=2e-3)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "GRID A100-10C",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 5090 Laptop GPU",
        "NVIDIA L40",
        "NVIDIA H20",
        "NVIDIA H800",
        "NVIDIA A800-SXM4-80GB",
        "AMD Instinct MI300A",
        "NVIDIA A10",
        "NVIDIA RTX A1000",
        "Tesla V100-SXM2-32GB",
        "GeForce 256",
        "",
    ],
)
def test_a_gpu_that_is_not_listed_has_no_peak(name):
    """Also a slower one whose name contains that of a listed one: its MFU would be wrong."""
    assert math.isnan(peak_flops_of(name))
