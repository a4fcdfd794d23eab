#!/usr/bin/env bash
# Train two steps in litgpt on a CPU, import, and compare the third step with ours: logits, weights, moments, counts.
#   scripts/other_trainers/litgpt.sh [FOLDER]
# FOLDER (default: a new one) gets litgpt's environment, its checkpoints and the imports. Run it in titan_cpt's own
# environment. The last comparison is of weight_decay 0.1, which litgpt applies to norms too: there it must differ.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$(realpath -m "${1:-$(mktemp -d)}")
mkdir -p "$folder"
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= TORCHDYNAMO_DISABLE=1  # compiled, litgpt computes the same, minutes later
if [ ! -x "$folder/venv/bin/litgpt" ]; then
    python -m venv "$folder/venv"
    # litgpt does not install requests, without which its command ends with an ImportError of jsonargparse.
    "$folder/venv/bin/pip" install --quiet torch==2.13.0 litgpt==0.5.13 requests
fi
"$folder/venv/bin/python" -c 'import litgpt.utils, importlib.metadata as m, torch; print("litgpt", m.version("litgpt"), "torch", torch.__version__)'

lr_of() {  # the learning rate of the last step of a checkpoint
    python -c 'import json, sys; print(json.load(open(sys.argv[1] + "/manifest.json"))["trained_by"]["lr"])' "$1"
}

compare() {  # MODEL WEIGHT_DECAY
    local run="$folder/$1-$2" step
    rm -rf "$run"
    "$folder/venv/bin/python" "$here/litgpt_run.py" "$1" "$run" --weight-decay "$2" > "$run.log" 2>&1
    for step in step-00000002 step-00000003; do
        titan-cpt import --from litgpt "$run/$step" "$run/$step/ours" > "$run/$step/import.log"
    done
    echo "== $1, weight_decay $2"
    sed -n '/^imported/p;/^step/p' "$run/step-00000002/import.log"
    python "$here/next_step.py" "$run/step-00000002/ours" "$run/step-00000003/ours" "$run/batch.pt" --seq-len 32 \
        --lr "$(lr_of "$run/step-00000003/ours")" --weight-decay "$2"
}

for model in pythia llama mistral qwen2.5 qwen3 smollm; do
    compare "$model" 0.0
done
if compare llama 0.1; then
    echo "weight decay of norms made no difference"
    exit 1
fi
