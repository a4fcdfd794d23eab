#!/usr/bin/env bash
# Train a tiny model in Megatron-LM's core, import its checkpoints, and compare the logits and the next step.
#
#   scripts/other_trainers/megatron.sh FOLDER
#
# FOLDER gets an environment with torch and megatron-core (about 2 GB), unless it has one, and the checkpoints (20 MB).
# titan-cpt and python are those on the PATH. 12 minutes on two CPU cores; no GPU. Each line "equal to float32's
# rounding" is one checkpoint format; the exit status is 1 if one differs. With pipeline stages the logits are not
# compared before the step, because no rank has them; its loss and the weights after it are.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mkdir -p "$1" && cd "$1" && pwd)
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
if [ ! -x "$work/venv/bin/torchrun" ]; then
  python3 -m venv "$work/venv"
  "$work/venv/bin/pip" install --quiet torch==2.13.0
  # megatron-core does not install psutil, without which its processes that write torch_dist files fail.
  "$work/venv/bin/pip" install --quiet numpy psutil megatron-core==0.16.1
fi

run() {  # NAME RANKS OPTIONS...
  local name=$1 ranks=$2 format step
  shift 2
  echo "== $name"
  rm -rf "$work/$name" "$work/imported/$name"
  "$work/venv/bin/torchrun" --nproc-per-node "$ranks" "$here/megatron_run.py" "$work/$name" "$@" 2> "$work/$name.log"
  for format in torch_dist torch; do
    for step in 2 3; do
      titan-cpt import --from megatron "$work/$name/$format/iter_000000$step" "$work/imported/$name/$format-$step" |
        grep "^imported"
    done
    python "$here/next_step.py" "$work/imported/$name/$format-2" "$work/imported/$name/$format-3" \
      "$work/$name/batch.pt" --lr 1e-3
  done
}

run one-rank 1
run tensor-parallel 2 --tp 2
run pipeline 2 --pp 2
run distributed-optimizer 2 --distributed-optimizer dp_reshardable
run distributed-optimizer-tp 2 --tp 2 --distributed-optimizer dp_reshardable
run distributed-optimizer-pp 2 --pp 2 --distributed-optimizer dp_reshardable --model qwen3
run reshardable 2 --distributed-optimizer fully_reshardable
run qwen3 2 --tp 2 --model qwen3
run gpt-neox 2 --tp 2 --model gpt_neox
