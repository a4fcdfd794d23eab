#!/usr/bin/env bash
# Compare torchtitan 0.3 with titan_cpt on this machine's CPU: import of its checkpoints, the next step, export to it.
#
#   scripts/other_trainers/torchtitan.sh
#
# torchtitan gets a virtual environment of its own (about 1.5 GB) in a temporary folder, which is removed at the end.
# For llama3 on one rank and qwen3 on two (FSDP over gloo): torchtitan trains two steps and saves, trains a third and
# saves; both checkpoints are imported; the logits before, and weights and moments after our third step are compared
# (next_step.py). Then the weights are exported, loaded by torchtitan, saved by it, and imported again: the same bits.
#
# Environment:
#   PYTHON    interpreter that has titan_cpt (default: python3)
#   TITAN     interpreter of an environment with torchtitan, instead of a new one
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
python=${PYTHON:-python3}
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore PYTHONPATH=$here/../..${PYTHONPATH:+:$PYTHONPATH}
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
readonly here python folder

make_environment() {
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet torch==2.13.0   # first: torchtitan would take the newest, with CUDA
    "$folder/venv/bin/pip" install --quiet torchtitan==0.3.0 triton
    titan=$folder/venv/bin/python
}

train() { # MODEL RANKS FOLDER [options]
    if ! "$titan" -m torch.distributed.run --nproc-per-node "$2" "$here/torchtitan_run.py" "$1" "${@:3}" \
        >"$folder/log" 2>&1; then
        tail -n 30 "$folder/log"
        exit 1
    fi
}

import() { # CHECKPOINT OUT CONFIG [options]
    "$python" -m titan_cpt import --from torchtitan "$1" "$2" --config "$3" --tokenizer bytes "${@:4}"
}

compare() { # MODEL RANKS
    local run=$folder/$1
    echo "== $1, $2 rank(s): torchtitan trains three steps"
    train "$1" "$2" "$run"
    import "$run/checkpoint/step-2" "$run/ours-2" "$run/config.json" | sed -n '2,4p'
    import "$run/checkpoint/step-3" "$run/ours-3" "$run/config.json" >/dev/null
    "$python" "$here/next_step.py" "$run/ours-2" "$run/ours-3" "$run/batch.pt" --lr 0.00075
    echo "== $1: export to torchtitan, which loads and saves it; import of both"
    "$python" -m titan_cpt export --format dcp "$run/ours-2" "$run/exported" | sed -n 1p
    train "$1" 1 "$run/loaded" --initial "$run/exported"
    import "$run/exported" "$run/again" "$run/config.json" >/dev/null
    import "$run/loaded/checkpoint/step-0" "$run/reloaded" "$run/config.json" --weights-only >/dev/null
    "$python" "$here/same_weights.py" "$run/ours-2" "$run/again" "$run/reloaded"
}

titan=${TITAN:-}
[[ -n $titan ]] || make_environment
"$titan" -c 'import torch, importlib.metadata as m; print("torchtitan", m.version("torchtitan"), "torch", torch.__version__)'
compare llama3 1
compare qwen3 2
