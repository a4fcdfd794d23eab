#!/usr/bin/env bash
# The races of docs/performance.md: ours and other trainers take turns on the same work. Everything is passed on:
#   scripts/bench/run.sh                          all races (under 30 minutes on a quiet machine), tables written
#   scripts/bench/run.sh --quick                  A and B in three turns (under 8), printed only
#   scripts/bench/run.sh --races C --turns 12     one of them, longer
# The peers live in an environment of their own, made on the first call.
#   PYTHON       Python with titan_cpt (default: .venv/bin/python)
#   BENCH_VENV   where the peers are (default: .venv-bench)
#   CORE         the core that every contestant is pinned to (default: 0)
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-.venv/bin/python}"
venv="${BENCH_VENV:-.venv-bench}"

if [ ! -x "$venv/bin/python" ]; then
    "$python" -m venv "$venv"
    "$venv/bin/pip" install -q -r scripts/bench/speed/requirements.txt
    "$venv/bin/pip" install -q --no-deps torchtitan==0.2.2 # its data sets and trackers are not needed
fi

write=(--write docs/performance.md)
for argument in "$@"; do
    [ "$argument" = --quick ] && write=()
done
pin=()
command -v taskset > /dev/null && pin=(taskset -c "${CORE:-0}")
exec "${pin[@]}" "$python" -u scripts/bench/speed/race.py --peers "$venv/bin/python" "${write[@]}" "$@"
