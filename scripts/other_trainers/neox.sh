#!/usr/bin/env bash
# Train a tiny model in GPT-NeoX with DeepSpeed, import its checkpoints, and compare the next step.
#
#   scripts/other_trainers/neox.sh SOURCE FOLDER
#
# SOURCE is a checkout of https://github.com/EleutherAI/gpt-neox (commit ea7aefd8). FOLDER gets an environment with torch
# and deepspeed (about 2 GB), unless it has one, and the checkpoints (20 MB). titan-cpt and python are those on the PATH.
# Some minutes on two CPU cores; no GPU. Each line "equal to float32's rounding" is one layout; the exit status is 1 if
# one differs.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source=$(cd "$1" && pwd)
work=$(mkdir -p "$2" && cd "$2" && pwd)
export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
if [ ! -x "$work/venv/bin/torchrun" ]; then
  python3 -m venv "$work/venv"
  "$work/venv/bin/pip" install --quiet torch==2.13.0
  "$work/venv/bin/pip" install --quiet numpy "setuptools<80" wheel
  DS_BUILD_OPS=0 "$work/venv/bin/pip" install --quiet --no-build-isolation deepspeed==0.19.8
  "$work/venv/bin/pip" install --quiet pyyaml ftfy regex six tiktoken tokenizers sentencepiece pybind11 boto3 \
    hf_transfer transformers shortuuid
fi

run() {  # NAME RANKS OPTIONS...
  local name=$1 ranks=$2 step
  shift 2
  echo "== $name"
  rm -rf "$work/$name" "$work/imported/$name"
  "$work/venv/bin/torchrun" --nproc-per-node "$ranks" "$here/neox_run.py" "$source" "$work/$name" "$@" \
    > "$work/$name.log" 2>&1
  for step in 2 3; do
    titan-cpt import --from neox "$work/$name/global_step$step" "$work/imported/$name/$step" | grep "^imported"
  done
  python "$here/next_step.py" "$work/imported/$name/2" "$work/imported/$name/3" "$work/$name/batch.pt" --lr 1e-3
}

run one-rank 1
run llama-tensor-parallel 2 --tp 2 --model llama
run pipeline 2 --pp 2
