"""Triton kernels run on the CPU by Triton's interpreter, and compiled for GPUs that this machine does not have."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NEEDS_TRITON = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: pip install triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy computes masked elements too
]
ARCHITECTURES = {80: "sm_80", 90: "sm_90a"}


@contextlib.contextmanager
def interpreted(name: str) -> Iterator[Any]:
    """Within the context, the module of this name has kernels that run on CPU tensors.

    `triton.jit` chooses between interpreter and compiler when a module is imported, so it is imported anew.
    """
    parent = importlib.import_module(name.rpartition(".")[0])
    before = sys.modules.pop(name, None)
    previous = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield importlib.import_module(name)
    finally:
        del os.environ["TRITON_INTERPRET"]
        if previous is not None:
            os.environ["TRITON_INTERPRET"] = previous
        del sys.modules[name]
        delattr(parent, name.rpartition(".")[2])
        if before is not None:
            sys.modules[name] = before
            setattr(parent, name.rpartition(".")[2], before)


def compiled_for(kernel: Any, architecture: int, folder: Path, *, warps: int, **arguments: Any) -> tuple[str, str]:
    """A kernel's PTX, and ptxas's report on registers and spills.

    Args:
        arguments: by parameter: the type of a run-time argument, such as "*fp32", or the value of a constexpr.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: value if isinstance(value, str) else "constexpr" for name, value in arguments.items()}
    values = {name: value for name, value in arguments.items() if not isinstance(value, str)}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")}
    source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=aligned)
    target = GPUTarget("cuda", architecture, 32)
    ptx = triton.compile(source, target=target, options={"num_warps": warps}).asm["ptx"]
    (folder / "kernel.ptx").write_text(ptx)
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    command = [str(ptxas), "-v", f"-arch={ARCHITECTURES[architecture]}", "kernel.ptx", "-o", "kernel.cubin"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return ptx, done.stderr


def accesses(ptx: str) -> dict[str, int]:
    """How often each load from and store to global memory is in a kernel, such as {"ld.global.v4.b32": 4}."""
    found: dict[str, int] = {}
    for name in re.findall(r"\b(?:ld|st)\.global[\w.:]*", ptx):
        found[name] = found.get(name, 0) + 1
    return found
