"""Settings of the whole process: ignored warnings, the C library's allocator, deterministic cuBLAS."""

from __future__ import annotations

import os
import warnings

from titan_cpt.common.allocator import keep_freed_memory

_IGNORED_WARNINGS = (
    "'set_vital' is deprecated",  # raised inside torch when torchdata's loader starts
    "torch.distributed is disabled, unavailable or uninitialized",  # DCP in a single process, as intended
    "Warning: Profiler clears events at the end of each cycle",  # expected: profiler.py writes a trace per cycle
    "FSDP2-wrapped module .* returned a view tensor",  # a hint for models that modify the view in place
)


def configure_process(*, deterministic: bool) -> None:
    """Apply the settings; before CUDA starts, which reads that of cuBLAS."""
    for message in _IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    keep_freed_memory()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
