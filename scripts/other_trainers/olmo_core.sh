#!/usr/bin/env bash
# Train two steps in OLMo-core on a CPU, import, and compare the third step with ours: logits, weights, moments, counts.
#   scripts/other_trainers/olmo_core.sh [FOLDER]
# FOLDER (default: a new one) gets OLMo-core's environment, its checkpoints and the imports. Run it in titan_cpt's own
# environment. "uncounted" is a SkipStepAdamW that counts no steps, after 30 of them. The last comparison is of
# OLMo-core's own choice of decayed weights: there it must differ.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$(realpath -m "${1:-$(mktemp -d)}")
mkdir -p "$folder"
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
if [ ! -x "$folder/venv/bin/torchrun" ]; then
    python -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet torch==2.13.0 ai2-olmo-core==3.0.0
fi
"$folder/venv/bin/python" -c 'import importlib.metadata as m; print("OLMo-core", m.version("ai2-olmo-core"), "torch", m.version("torch"))'

of() {  # the LR of the last step, or a setting, of an import
    python -c 'import json, sys
found = json.load(open(sys.argv[1] + "/manifest.json"))["trained_by"]
print(found["lr"] * float(sys.argv[3]) if sys.argv[2] == "lr" else found["settings"]["optimizer." + sys.argv[2]])' "$@"
}

compare() {  # MODEL STEPS [options of olmo_core_run.py]
    local model=$1 last=$2 before=$(($2 - 1)) times=1 step
    shift 2
    local run="$folder/$model$*"
    rm -rf "$run"
    "$folder/venv/bin/torchrun" --nproc-per-node 1 "$here/olmo_core_run.py" "$model" "$run" --steps "$last" "$@" \
        > "$run.log" 2>&1
    for step in "step$before" "step$last"; do
        titan-cpt import --from olmo-core "$run/run/$step" "$run/$step" > "$run/$step.log"
    done
    echo "== $model $*"
    sed -n '/^imported/p;/^step/p' "$run/step$before.log"
    if grep -q "multiply its LR" "$run/step$before.log"; then
        times=$(sed -n 's/.*multiply its LR by \([0-9.]*[0-9]\).*/\1/p' "$run/step$before.log")
        echo "LR times $times, as the import says"
    fi
    python "$here/next_step.py" "$run/step$before" "$run/step$last" "$run/batch.pt" --seq-len 32 \
        --lr "$(of "$run/step$last" lr "$times")" --weight-decay "$(of "$run/step$before" weight_decay)" \
        --beta1 "$(of "$run/step$before" beta1)" --beta2 "$(of "$run/step$before" beta2)" \
        --eps "$(of "$run/step$before" eps)"
}

for model in llama qwen3 tied complex yarn stepwise fused skip olmo2 olmo3; do
    compare "$model" 3
done
compare uncounted 31
if compare llama 3 --decay-all; then
    echo "the decay of other weights made no difference"
    exit 1
fi
