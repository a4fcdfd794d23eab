"""What is known of GPUs without torch: the driver, and dense bfloat16 peaks by name, for MFU."""

from __future__ import annotations

import math
import re
from pathlib import Path

NVIDIA_DRIVER_FILE = Path("/sys/module/nvidia/version")
"""Holds the driver's release, if there is an NVIDIA driver; also visible in containers."""

# (pattern of the name, FLOP/s) of matrix products in bfloat16 with float32 accumulation, without sparsity, at boost
# clock. NVIDIA's data sheets give most figures with sparsity, which is twice the dense one. The first match counts.
_PEAKS: tuple[tuple[str, float], ...] = (
    (r"\bA100\b", 312e12),  # "NVIDIA A100 Tensor Core GPU" data sheet: 312 (624 with sparsity); SXM and PCIe
    (r"\bH100 PCIe\b", 756e12),  # "NVIDIA H100 Tensor Core GPU" data sheet of 2022: 1,513 with sparsity
    (r"\bH[12]00 NVL\b", 835e12),  # data sheets of H100 (2024) and H200: 1,671 with sparsity
    (r"\bG?H[12]00\b", 989e12),  # H100 SXM, H200 SXM, GH200: 1,979 with sparsity in each data sheet
    (r"\bGB200\b", 2500e12),  # "NVIDIA GB200 NVL72": 360 PFLOP/s with sparsity for 72 GPUs
    (r"\bB200\b", 2250e12),  # "NVIDIA HGX B200": 36 PFLOP/s with sparsity for 8 GPUs
    (r"\bL40S\b", 362e12),  # "NVIDIA L40S" data sheet: 362.05 (733 with sparsity)
    (r"\bRTX 4090$", 165.2e12),  # "NVIDIA Ada GPU architecture" whitepaper, appendix A; not the 4090 D or a laptop's
    (r"\bRTX 5090$", 209.5e12),  # "NVIDIA RTX Blackwell GPU architecture" whitepaper, appendix A; likewise
    (r"\bMI300X\b", 1307.4e12),  # "AMD Instinct MI300X accelerator" data sheet: 1,307.4 (2,614.9 with sparsity)
)


def peak_flops_of(name: str) -> float:
    """Dense bfloat16 peak of a GPU in FLOP/s, from its data sheet; NaN if it is not listed, or is a share of one.

    Names of MIG devices contain MIG; those of virtual GPUs begin with GRID.

    Args:
        name: as `torch.cuda.get_device_name` returns it, such as "NVIDIA H100 80GB HBM3".
    """
    if re.search(r"\bMIG\b|^GRID\b", name):
        return math.nan
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, name)), math.nan)
