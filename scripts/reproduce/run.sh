#!/usr/bin/env bash
# The paper's claims reproduced small; see docs/reproduction.md.
#
#   scripts/reproduce/run.sh --quick                 three claims, one seed: 6 minutes on two cores
#   scripts/reproduce/run.sh                         all claims, three seeds: about 2 1/2 hours on two cores
#
# Those are cores with instructions for bfloat16 (AMX); without them it takes about four times as long.
#
#   NOVELS_ARCHIVE=novels.tar.xz scripts/reproduce/run.sh ...    the text from a file instead of the network
#
# Run it again after an interruption: what is done stays done. Other options are reproduce.py's (--help).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=python
[[ ! -x $root/.venv/bin/python ]] || python=$root/.venv/bin/python
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two arms at once, a core for each
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

archive=()
[[ -z ${NOVELS_ARCHIVE:-} ]] || archive=(--archive "$NOVELS_ARCHIVE")
cd "$root"
exec "$python" scripts/reproduce/reproduce.py "${archive[@]}" "$@"
