#!/usr/bin/env bash
# Compare the speed of titan_cpt and other trainers on the same work (docs/performance.md). Options go to race.py:
#   scripts/bench/run.sh                          all shapes (under 30 minutes on a quiet machine); writes the tables
#   scripts/bench/run.sh --quick                  A and B in three turns (under 8 minutes); prints only
#   scripts/bench/run.sh --races C --turns 12     one shape, more turns
# The other trainers have a separate virtual environment, created on the first call.
#   PYTHON       Python with titan_cpt (default: .venv/bin/python)
#   BENCH_VENV   virtual environment of the other trainers (default: .venv-bench)
#   CORE         the core to which every trainer is pinned (default: 0)
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
