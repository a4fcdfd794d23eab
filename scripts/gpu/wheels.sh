#!/usr/bin/env bash
# Download the packages that a GPU machine without a network lacks, for check.sh --wheels.
#
#   scripts/gpu/wheels.sh DIR [--python 3.12] [--extras float8] [--packages A==1,B==2] [--have FILE]
#
# The packages are the requirements in pyproject.toml and all that these require, except torch and what torch brings
# (CUDA libraries, triton), and except those named in FILE, one a line, which the machine has; packages_there.txt lists
# what a container with torch 2.11, JAX and transformers on Python 3.12 had. Downloads wheels only, for x86-64 Linux, and
# prints their sizes. PYTHON is the interpreter with pip (default: python3).
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname -- "${BASH_SOURCE[0]}")/wheels.py" "$@"
