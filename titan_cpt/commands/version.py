"""`titan-cpt --version`: versions of titan_cpt, Python, torch and CUDA, and the devices; what a bug report needs."""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path


class PrintVersion(argparse.Action):
    """Prints one line each and exits with 0. The first two do not need torch: a broken torch is reported after them."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print and exit."""
        from titan_cpt.common.version import own_version
        from titan_cpt.doctor.versions import commit_of, torch_lines

        print(f"titan_cpt {own_version()}{commit_of(Path(__file__).parents[2])}", flush=True)
        print(f"Python {platform.python_version()} ({sys.executable})", flush=True)
        for line in torch_lines():
            print(line, flush=True)
        parser.exit()
