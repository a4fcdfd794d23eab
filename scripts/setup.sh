#!/usr/bin/env bash
# Install titan_cpt: a virtual environment in .venv, torch, and this package (editable) with its requirements.
#
#   ./scripts/setup.sh               for training and the quick start (the extra "hf")
#   ./scripts/setup.sh test          for the tests; any extras of pyproject.toml can be given
#
# Environment:
#   PYTHON            interpreter for .venv (default: python3)
#   TORCH             version of torch to install (default: 2.13.0, with TORCH_INDEX_URL the newest there), or "system":
#                     .venv uses the packages of PYTHON, with the torch that a container has, and installs none
#   TORCH_INDEX_URL   package index for torch (default: pip's own): https://download.pytorch.org/whl/ followed by cpu, by
#                     cu126, cu128, ... for a CUDA version, or by a version of ROCm
#
# For Linux on x86-64 pip's own index has torch's builds for CUDA 13: about 3 GB to download, 5 GB on the disk. They run
# without a GPU; with one they need NVIDIA's driver 580 or newer.
#
# It can be run again at any time: it installs only what is missing or incomplete.
set -euo pipefail

readonly OLDEST_TORCH=2.11
readonly DEFAULT_TORCH=2.13.0
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
readonly root
readonly venv="$root/.venv"
readonly venv_python="$venv/bin/python"

main() {
    if [[ ${1:-} == -h || ${1:-} == --help ]]; then
        sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
        return
    fi
    local extras keep_torch=()
    check_torch_choice
    extras=$(joined_by_comma "${@:-hf}")
    check_extras "$extras"
    make_venv
    if is_installed "$extras"; then
        say ".venv has titan_cpt[$extras] and all of its requirements: nothing to do"
        return
    fi
    install_torch
    run "$venv_python" -m pip install --editable "${root}[$extras]" "${keep_torch[@]}"
    is_installed "$extras" || fail \
        "pip reported success, but $venv lacks requirements of titan_cpt[$extras] (or torch does not import)." \
        "Remove $venv and run this again."
    say "done. Next: ./run_train.sh (the quick start)$([[ ",$extras," == *,test,* || ",$extras," == *,dev,* ]] &&
        printf ', .venv/bin/pytest (the tests)')"
}

say() { printf 'setup: %s\n' "$*"; }

fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 2
}

# Print a command as it could be typed, then run it.
run() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

joined_by_comma() {
    local IFS=,
    printf '%s' "$*"
}

# Fail for an unknown extra; pip only prints a warning.
check_extras() {
    local known extra
    known=$(sed -n '/^\[project\.optional-dependencies\]/,/^\[/s/^\([A-Za-z0-9_-]\{1,\}\) *=.*/\1/p' "$root/pyproject.toml")
    for extra in ${1//,/ }; do
        grep -qx -- "$extra" <<<"$known" ||
            fail "no extra is called '$extra'; pyproject.toml has: $(tr '\n' ' ' <<<"$known")"
    done
}

# Fail for a TORCH that is neither a version nor "system".
check_torch_choice() {
    [[ ${TORCH:-system} == system || $TORCH =~ ^[0-9]+(\.[0-9]+)+[0-9a-z.+]*$ ]] ||
        fail "TORCH must be a version of torch, such as 2.15.0, or 'system'; got '$TORCH'"
    [[ ${TORCH:-} != system || -z ${TORCH_INDEX_URL:-} ]] ||
        fail "TORCH=system installs no torch: unset TORCH_INDEX_URL, or unset TORCH"
}

# Make .venv, or repair one that an interrupted run left incomplete.
make_venv() {
    if is_venv && { has_pip || run "$venv_python" -m ensurepip --upgrade; }; then
        is_recent "$venv_python" || fail \
            "titan_cpt needs Python 3.10 or newer; .venv has $("$venv_python" --version 2>&1)." \
            "Remove $venv and run this again with a newer python3, or with PYTHON=/path/to/python3.11."
        return
    fi
    local python
    python=$(find_python)
    local options=()
    if [[ -e $venv ]]; then
        say "$venv is incomplete (an interrupted run?): making it again"
        options+=(--clear)
    fi
    if [[ ${TORCH:-} == system ]]; then
        options+=(--system-site-packages)
    elif [[ -z ${TORCH:-}${TORCH_INDEX_URL:-} ]] && has_torch "$python"; then
        say "$python has torch already; to use that one, interrupt this and run: TORCH=system ./scripts/setup.sh"
    fi
    run "$python" -m venv "${options[@]}" "$venv"
}

# A link to an interpreter without pyvenv.cfg would be the system's Python.
is_venv() { "$venv_python" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' >/dev/null 2>&1; }

has_pip() { "$venv_python" -m pip --version >/dev/null 2>&1; }

# Print the path of an interpreter that can make a virtual environment, or fail.
find_python() {
    local python
    python=$(command -v -- "${PYTHON:-python3}") || fail \
        "found no ${PYTHON:-python3}; titan_cpt needs Python 3.10 or newer." \
        "Install it, or choose another interpreter: PYTHON=/path/to/python3.11 ./scripts/setup.sh"
    is_recent "$python" || fail \
        "titan_cpt needs Python 3.10 or newer; found $("$python" --version 2>&1) at $python." \
        "Choose a newer one: PYTHON=/path/to/python3.11 ./scripts/setup.sh"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail \
        "$python cannot make virtual environments: its modules venv and ensurepip are missing." \
        "On Debian and Ubuntu: sudo apt-get install python3-venv" \
        "Or choose another interpreter: PYTHON=/path/to/python3.11 ./scripts/setup.sh"
    printf '%s' "$python"
}

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; }

has_torch() { "$1" -c 'import torch; torch.empty(1)' 2>/dev/null; }

# Install torch, unless there is one or it is the system's. Of the latter set `keep_torch`: a pip option with which no
# other package replaces it.
install_torch() {
    if [[ ${TORCH:-} == system ]]; then
        has_torch "$venv_python" || fail \
            "TORCH=system, but ${PYTHON:-python3} has no torch that $venv can import." \
            "A .venv made without TORCH=system does not see it: remove $venv and run this again." \
            "If torch is in a virtual environment: activate that and run: pip install --editable $root"
        "$venv_python" -c "import sys, torch; sys.exit(torch.__version__ < '$OLDEST_TORCH')" ||
            fail "titan_cpt needs torch $OLDEST_TORCH or newer; use a newer container, or unset TORCH."
        "$venv_python" -c 'from importlib.metadata import version; print("torch===" + version("torch"))' \
            >"$venv/torch.txt"
        keep_torch=(--constraint "$venv/torch.txt")
    elif ! has_torch "$venv_python"; then
        local torch=torch==${TORCH:-$DEFAULT_TORCH} index=()
        if [[ -n ${TORCH_INDEX_URL:-} ]]; then
            index=(--index-url "$TORCH_INDEX_URL")
            [[ -n ${TORCH:-} ]] || torch="torch>=$OLDEST_TORCH"
        fi
        run "$venv_python" -m pip install "${index[@]}" "$torch"
    fi
}

# Whether this checkout is installed in .venv with the extras and all requirements, since pyproject.toml last changed.
is_installed() {
    "$venv_python" -I - "$root" "$1" <<'PYTHON_END'
import importlib.metadata as metadata
import json
import pathlib
import sys
import urllib.parse

from pip._vendor.packaging.requirements import Requirement

root, extras = pathlib.Path(sys.argv[1]), sys.argv[2].split(",")
try:
    package = metadata.distribution("titan_cpt")
    origin = json.loads(package.read_text("direct_url.json") or "{}")
    metadata_file = next(file for file in package.files or [] if file.name == "METADATA")
    installed_at = metadata_file.locate().stat().st_mtime
    path = urllib.parse.unquote(urllib.parse.urlsplit(origin.get("url", "")).path)
    editable = origin.get("dir_info", {}).get("editable", False)
    if not editable or pathlib.Path(path) != root or installed_at < (root / "pyproject.toml").stat().st_mtime:
        sys.exit(1)
    waiting, seen = [("titan_cpt", extra) for extra in ["", *extras]], set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for text in metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker and not needed.marker.evaluate({"extra": extra}):
                continue
            if not needed.specifier.contains(metadata.version(needed.name), prereleases=True):
                sys.exit(1)
            waiting += [(needed.name, more) for more in ["", *needed.extras]]
    import torch

    torch.empty(1)  # a partly installed torch may still import, as an empty namespace package
except (metadata.PackageNotFoundError, StopIteration, ImportError, AttributeError, OSError):
    sys.exit(1)
PYTHON_END
}

main "$@"
