#!/usr/bin/env bash
# Compare the speed of titan_cpt and other trainers on the same work (docs/performance.md). Options go to race.py:
#   scripts/bench/run.sh                              CPU: all shapes (under 30 minutes); writes docs/performance.md
#   scripts/bench/run.sh --quick                      CPU: A and B in three turns (under 8 minutes); prints only
#   scripts/bench/run.sh --races C --turns 12         one shape, more turns
#   scripts/bench/run.sh --device cuda                one GPU: Q, G405, L1B, W4096; writes docs/performance_gpu.md
#   scripts/bench/run.sh --device cuda --dry-run      the GPU's races with tiny shapes on a CPU; prints only
#   scripts/bench/run.sh --wheels FOLDER ...          no package registry: the other trainers are wheels in FOLDER
#   scripts/bench/run.sh --peers PYTHON ...           the other trainers are installed for this Python
# The other trainers have a virtual environment of their own, created on the first call. Those that are not installed
# are named in the tables.
#   PYTHON       Python with titan_cpt (default: .venv/bin/python, else python3)
#   BENCH_VENV   virtual environment of the other trainers (default: .venv-bench)
#   CORE         on a CPU the core to which every trainer is pinned (default: 0)
set -euo pipefail
cd "$(dirname "$0")/../.."
race=scripts/bench/speed/race.py
python="${PYTHON:-.venv/bin/python}"
[ -x "$(command -v "$python")" ] || python=python3
venv="${BENCH_VENV:-.venv-bench}"

wheels="" peers="" write=(--write) rest=()
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "$0"; exec "$python" "$race" --help ;;
        --wheels) wheels="${2:?--wheels needs a folder}"; shift ;;
        --peers) peers="${2:?--peers needs a Python}"; shift ;;
        --quick | --dry-run) write=(); rest+=("$1") ;;
        --write | --write=*) write=(); rest+=("$1") ;;
        *) rest+=("$1") ;;
    esac
    shift
done

if [ -n "$wheels" ]; then
    peers="${peers:-$python}"
    unpacked="$(mktemp -d)"
    trap 'rm -rf "$unpacked"' EXIT
    "$peers" -m pip install -q --no-index --no-deps --target "$unpacked" "$wheels"/*.whl
    rest+=(--wheels "$unpacked")
elif [ -z "$peers" ]; then
    peers="$venv/bin/python"
    if [ ! -x "$peers" ]; then
        "$python" -m venv "$venv"
        "$venv/bin/pip" install -q -r scripts/bench/speed/requirements.txt
        "$venv/bin/pip" install -q --no-deps torchtitan==0.2.2 # its data sets and trackers are not needed
    fi
fi
"$python" -u "$race" --peers "$peers" "${write[@]}" "${rest[@]}"
