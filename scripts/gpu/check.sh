#!/usr/bin/env bash
# Check titan_cpt on one GPU in under nine minutes: device ceilings, correctness, memory, speed, and the tests that need
# a GPU (docs/gpu.md). Needs Python with torch and this repository, which need not be installed.
#
#   scripts/gpu/check.sh --out results --text data/quickstart     what fits; a table at the end, results/check.json
#   scripts/gpu/check.sh --only ceilings,profile                  some sections (--list names them), or all but --skip
#   scripts/gpu/check.sh --dry-run                                tiny shapes on the CPU, a few minutes
#   scripts/gpu/check.sh --wheels DIR ...                         first install the packages in DIR (scripts/gpu/wheels.sh)
#
# The wheels go into a temporary folder that is removed at the end; the environment does not change.
#   PYTHON   the interpreter (default: python3)
# Exit status: 0 if no check failed, 1 if one failed, 2 for a wrong option or a missing package, 130 after Ctrl-C.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)
python=${PYTHON:-python3}
wheels="" arguments=()
while (($#)); do
    case $1 in
        --wheels=*) wheels=${1#*=} ;;
        --wheels)
            [[ $# -gt 1 ]] || { echo "check.sh: --wheels needs a folder" >&2 && exit 2; }
            wheels=$2
            shift
            ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
command -v "$python" >/dev/null || { echo "check.sh: '$python' is not on PATH: set PYTHON" >&2 && exit 2; }

site=$(mktemp -d "${TMPDIR:-/tmp}/gpu-check.XXXXXX")
trap 'rm -rf -- "$site"' EXIT
if [[ -n $wheels ]]; then
    shopt -s nullglob
    files=("$wheels"/*.whl)
    ((${#files[@]})) || { echo "check.sh: no wheels in '$wheels'; scripts/gpu/wheels.sh downloads them" >&2 && exit 2; }
    "$python" -m pip --version >/dev/null || { echo "check.sh: --wheels needs pip, and $python has none" >&2 && exit 2; }
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --find-links "$wheels" --target "$site" \
        "${files[@]}" || { echo "check.sh: the wheels in '$wheels' do not fit $("$python" -V)" >&2 && exit 2; }
fi
export PYTHONPATH=$root:$site${PYTHONPATH:+:$PYTHONPATH}
status=0
"$python" -u "$root/scripts/gpu/check.py" ${arguments[@]+"${arguments[@]}"} || status=$?
exit "$status"
