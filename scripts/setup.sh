#!/usr/bin/env bash
# From a bare machine to a working titan_cpt: a virtual environment in .venv, torch, and this package (editable).
#
#   ./scripts/setup.sh               what training and the quick start need (the extra "hf")
#   ./scripts/setup.sh test          what the tests need; any extras of pyproject.toml can be named
#
# Environment:
#   PYTHON            the interpreter to make .venv with (default: python3)
#   TORCH_INDEX_URL   where pip takes torch from (default: pip's own index), for example
#                     https://download.pytorch.org/whl/cpu
#
# It may be run again at any time: what is there is kept, what is missing or half done is mended.
set -euo pipefail

readonly TORCH="torch==2.13.0"
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
readonly root
readonly venv="$root/.venv"
readonly venv_python="$venv/bin/python"

main() {
    if [[ ${1:-} == -h || ${1:-} == --help ]]; then
        sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
        return
    fi
    local extras
    extras=$(joined_by_comma "${@:-hf}")
    check_extras "$extras"
    make_venv
    if is_installed "$extras"; then
        say ".venv has titan_cpt[$extras] and all that it needs: nothing to do"
        return
    fi
    install_torch
    run "$venv_python" -m pip install --editable "${root}[$extras]"
    is_installed "$extras" || fail \
        "pip reported success, yet what titan_cpt[$extras] needs is not complete in $venv (or torch does not import)." \
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

# pip only warns about an extra that does not exist.
check_extras() {
    local known extra
    known=$(sed -n '/^\[project\.optional-dependencies\]/,/^\[/s/^\([A-Za-z0-9_-]\{1,\}\) *=.*/\1/p' "$root/pyproject.toml")
    for extra in ${1//,/ }; do
        grep -qx -- "$extra" <<<"$known" ||
            fail "no extra is called '$extra'; pyproject.toml has: $(tr '\n' ' ' <<<"$known")"
    done
}

# Make .venv, or mend one that an interrupted run left half made.
make_venv() {
    if is_venv && { has_pip || run "$venv_python" -m ensurepip --upgrade; }; then
        is_recent "$venv_python" || fail \
            "titan_cpt needs Python 3.10 or newer; .venv has $("$venv_python" --version 2>&1)." \
            "Remove $venv and run this again with a newer python3, or with PYTHON=/path/to/python3.11."
        return
    fi
    local python
    python=$(find_python)
    if [[ -e $venv ]]; then
        say "$venv is only half made (an interrupted run?): making it again"
        run "$python" -m venv --clear "$venv"
    else
        run "$python" -m venv "$venv"
    fi
}

# A link to an interpreter without its pyvenv.cfg would be the system's Python under another name.
is_venv() { "$venv_python" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' >/dev/null 2>&1; }

has_pip() { "$venv_python" -m pip --version >/dev/null 2>&1; }

# Print the path of an interpreter that can make a virtual environment, or say what is missing.
find_python() {
    local python
    python=$(command -v -- "${PYTHON:-python3}") || fail \
        "found no ${PYTHON:-python3}; titan_cpt needs Python 3.10 or newer." \
        "Install it, or name one that is there: PYTHON=/path/to/python3.11 ./scripts/setup.sh"
    is_recent "$python" || fail \
        "titan_cpt needs Python 3.10 or newer; found $("$python" --version 2>&1) at $python." \
        "Name a newer one: PYTHON=/path/to/python3.11 ./scripts/setup.sh"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail \
        "$python cannot make virtual environments: its modules venv and ensurepip are missing." \
        "On Debian and Ubuntu they are a package of their own: sudo apt-get install python3-venv" \
        "Or name another interpreter: PYTHON=/path/to/python3.11 ./scripts/setup.sh"
    printf '%s' "$python"
}

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; }

install_torch() {
    "$venv_python" -c 'import torch; torch.empty(1)' 2>/dev/null && return
    if [[ -n ${TORCH_INDEX_URL:-} ]]; then
        run "$venv_python" -m pip install --index-url "$TORCH_INDEX_URL" 'torch>=2.13'
    else
        run "$venv_python" -m pip install "$TORCH"
    fi
}

# Whether .venv holds this checkout with the extras, every requirement met, installed since pyproject.toml last changed.
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

    torch.empty(1)  # what is left of a half unpacked torch may still import, as an empty namespace
except (metadata.PackageNotFoundError, StopIteration, ImportError, AttributeError, OSError):
    sys.exit(1)
PYTHON_END
}

main "$@"
