#!/usr/bin/env bash
# Test the paper's claims with small models; see docs/reproduction.md.
#
#   scripts/reproduce/run.sh --quick                 three claims, one seed: 6 minutes on two cores
#   scripts/reproduce/run.sh                         all claims, three seeds: about 2 1/2 hours on two cores
#   scripts/reproduce/run.sh --averages --jobs 1     averages of weights and Reptile: 20 minutes of one core
#   scripts/reproduce/run.sh --vocabulary --jobs 1   an extended vocabulary: 20 minutes of one core
#
# Times are for cores with bfloat16 instructions (AMX); without them it takes about four times as long.
#
#   NOVELS_ARCHIVE=novels.tar.xz scripts/reproduce/run.sh ...    the text from a file instead of the network
#
# After an interruption the same command resumes. Other options: reproduce.py --help.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=python
[[ ! -x $root/.venv/bin/python ]] || python=$root/.venv/bin/python
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two runs at a time, one core each
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

archive=()
[[ -z ${NOVELS_ARCHIVE:-} ]] || archive=(--archive "$NOVELS_ARCHIVE")
cd "$root"
exec "$python" scripts/reproduce/reproduce.py "${archive[@]}" "$@"
