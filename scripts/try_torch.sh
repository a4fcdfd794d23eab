#!/usr/bin/env bash
# Run the tests with another version of torch, in a virtual environment of its own.
#
#   scripts/try_torch.sh 2.15.0                              all tests
#   scripts/try_torch.sh 2.11.0 -n 0 tests/unit/checkpoint   with arguments of pytest
#
# Environment:
#   PYTHON            interpreter of the environment (default: python3)
#   TORCH_INDEX_URL   package index for torch (default: pip's own)
#   FOLDER            where the environment (about 6 GB) and the log are kept (default: a folder titan_cpt-torch in
#                     TMPDIR); an environment from an earlier run is used again
#
# The last line is the verdict: versions, counts, where the log is. Exit status: pytest's; 2 if the environment cannot be
# made.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
readonly root

fail() {
    printf 'try_torch: %s\n' "$@" >&2
    exit 2
}

main() {
    if [[ ${1:-} == -h || ${1:-} == --help ]]; then
        sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
        return
    fi
    local version=${1:-}
    [[ $version =~ ^[0-9]+(\.[0-9]+)+[0-9a-z.+]*$ ]] || fail "give a version of torch, such as 2.15.0; got '$version'"
    shift
    local folder=${FOLDER:-${TMPDIR:-/tmp}/titan_cpt-torch}
    local venv=$folder/torch-$version log=$folder/torch-$version.log status=0 index=()
    [[ -z ${TORCH_INDEX_URL:-} ]] || index=(--index-url "$TORCH_INDEX_URL")
    mkdir -p -- "$folder"
    if ! has_version "$venv" "$version"; then
        {
            "${PYTHON:-python3}" -m venv --clear "$venv" &&
                "$venv/bin/python" -m pip install "${index[@]}" "torch==$version"
        } 2>&1 | tee -- "$log" || fail "torch $version cannot be installed for ${PYTHON:-python3}; see $log"
    fi
    # torch is named again: nothing that is installed with it may replace it.
    "$venv/bin/python" -m pip install --editable "${root}[test]" "torch==$version" 2>&1 | tee -- "$log" ||
        fail "titan_cpt cannot be installed beside torch $version; see $log"
    cd -- "$root"
    "$venv/bin/python" -m pytest "$@" 2>&1 | tee -- "$log" || status=${PIPESTATUS[0]}
    printf 'try_torch: %s, %s: %s; log: %s\n' "$("$venv/bin/python" -c '
import platform, torch
print(f"torch {torch.__version__}, Python {platform.python_version()}")')" \
        "$([[ $status == 0 ]] && echo PASSED || echo "FAILED with exit status $status")" "$(tail -n 1 -- "$log" | sed 's/^=* *//;s/ *=*$//')" "$log"
    exit "$status"
}

# Whether an environment has this torch.
has_version() {
    "$1/bin/python" -c 'import sys, torch
torch.empty(1)
sys.exit(torch.__version__.split("+")[0] != sys.argv[1].split("+")[0])' "$2" 2>/dev/null
}

main "$@"
