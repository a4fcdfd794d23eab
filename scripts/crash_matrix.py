"""Kill a small run with SIGKILL many times, resume it, and compare its result with that of an uninterrupted run.

    python scripts/crash_matrix.py --kills 500               # about a third of a second each on an idle core
    python scripts/crash_matrix.py --kills 50 --ranks 2      # one of two ranks is killed each time

Prints how often a kill hit each phase of the run, then kills, resumes and mismatches. Exit status 1 if there is a
mismatch.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from crashes import Matrix  # noqa: E402  # of the tests, found by the line above


def main() -> int:
    """Parse the arguments, run the crash matrix, print its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="number of kills (default 50)")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes of the run (default 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the times of the kills (default 0)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is .*uninitialized")  # DCP in a single process
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="crash-matrix-") as folder:
        matrix = Matrix(Path(folder), seed=options.seed, ranks=options.ranks)
        toll = matrix.run_until(options.kills, lambda line: print(line, file=sys.stderr))
    print(toll.summary())
    print(f"seed {options.seed}, {options.ranks} rank(s), {time.monotonic() - began:.0f} s")
    return 1 if toll.mismatches or toll.damaged else 0


if __name__ == "__main__":
    sys.exit(main())
