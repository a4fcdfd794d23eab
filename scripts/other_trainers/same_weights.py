"""Whether checkpoints of titan_cpt have the same weights, bit for bit: `same_weights.py FIRST OTHER...`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from next_step import tensors


def main() -> int:
    """Compare each checkpoint with the first one; the exit status is 1 if a weight differs."""
    first, *others = ({k: v for k, v in tensors(Path(name)) if k.startswith("model.")} for name in sys.argv[1:])
    for name, other in zip(sys.argv[2:], others, strict=True):
        same = [key for key in first if key in other and torch.equal(first[key], other[key])]
        print(f"{Path(name).name}: {len(same)} of {len(first)} weights have the same bits")
        if len(same) != len(first) or len(other) != len(first):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
