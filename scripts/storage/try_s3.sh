#!/usr/bin/env bash
# Train from and to an S3 server on this machine (moto's), kill the run in the middle of an upload, and continue it on an
# empty disk. Prints a log; the last lines compare its losses with those of a run that knows no object storage.
#
#   scripts/storage/try_s3.sh [FOLDER]     FOLDER: where everything is written (default: a new temporary folder)
#
# Needs the extra "test". Takes about a minute on two cores.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)
readonly root
python=$(command -v "$root/.venv/bin/python" || command -v python)
server=

main() {
    if [[ ${1:-} == -h || ${1:-} == --help ]]; then
        sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
        return
    fi
    folder=${1:-$(mktemp -d "${TMPDIR:-/tmp}/titan_cpt-s3.XXXXXX")}
    mkdir -p -- "$folder"
    cd -- "$folder"
    export OMP_NUM_THREADS=1 PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    trap 'kill "$server" 2>/dev/null || true' EXIT

    say "1. Prepare text"
    write_texts
    titan prepare --input english.jsonl --output data/english --tokenizer bytes --holdout 0.1 --quiet
    titan prepare --input german.jsonl --output data/german --tokenizer bytes --holdout 0.1 --quiet

    say "2. Train without object storage, for comparison"
    write_config plain.toml plain data ""
    titan train plain.toml --quiet

    say "3. Start an S3 server, make a bucket, upload the data"
    start_server
    "$python" -c '
import fsspec, pathlib
s3 = fsspec.filesystem("s3")
s3.mkdir("bucket")
for path in sorted(pathlib.Path("data").iterdir()):
    s3.put_file(str(path), f"bucket/data/{path.name}")
    print(f"s3://bucket/data/{path.name}: {path.stat().st_size:,} bytes")
'
    write_config remote.toml remote s3://bucket/data \
        'upload = { to = "s3://bucket/runs", keep_local = 2 }'

    say "4. Train on the data in the bucket. In the middle of German the server stops answering writes; then kill -9"
    "$python" -m titan_cpt train remote.toml >log.txt 2>&1 &
    local run=$!
    until [[ -e outputs/remote/german/step-00000010 ]]; do sleep 0.02; done
    printf 'stall PUT' >server/control
    until [[ -e outputs/remote/german/step-00000040/manifest.json ]]; do sleep 0.02; done
    kill -9 "$run"
    wait "$run" 2>/dev/null || true
    printf '' >server/control
    grep -E 'uploaded|removed here|upload failed' log.txt || true
    echo "killed when step 40 of German was saved here"

    say "5. What the bucket holds: complete checkpoints, and one without a manifest"
    checkpoints_in_bucket

    say "6. The disk is lost: remove the run's folder and the cache, and give the same command"
    rm -rf outputs/remote cache
    titan train remote.toml | grep -E 'restoring|resumes|uploaded|removed here|newest checkpoint' || true

    say "7. The bucket now, and a check of the last checkpoint without downloading it"
    checkpoints_in_bucket
    titan verify s3://bucket/runs/remote/german/step-00000060

    say "8. Compare all losses, gradient norms and batches with those of step 2"
    "$python" "$root/scripts/compare_losses.py" outputs/plain outputs/remote --tolerance 0
}

say() { printf '\n== %s\n' "$*"; }

titan() { "$python" -m titan_cpt "$@"; }

write_texts() {
    "$python" - <<'END'
import json
import random

for name, words in (("english", "the house and river were old but nobody knew why"), ("german", "das alte Haus am Fluss war leer und keiner kam")):
    draw = random.Random(name)
    with open(f"{name}.jsonl", "w", encoding="utf-8") as file:
        for _ in range(600):
            file.write(json.dumps({"text": " ".join(draw.choices(words.split(), k=draw.randrange(20, 60)))}) + "\n")
END
}

# write_config FILE NAME DATA CHECKPOINT-KEYS
write_config() {
    cat >"$1" <<END
[job]
name = "$2"
[model]
family = "gpt_neox"
size   = "debug"
[datasets.english]
train      = "$3/english"
validation = "$3/english-validation"
[datasets.german]
train      = "$3/german"
validation = "$3/german-validation"
[training]
global_batch_size     = 8
local_batch_size      = 8
seq_len               = 64
mixed_precision_param = "float32"
[checkpoint]
interval = 10
$4
[storage]
cache_dir = "cache"
[metrics]
log_freq           = 1
enable_tensorboard = false
[validation]
interval  = 10
sequences = 8
[[stages]]
name    = "english"
dataset = "english"
steps   = 30
lr      = { schedule = "cosine", max = 3e-3 }
[[stages]]
name    = "german"
dataset = "german"
steps   = 60
lr      = { schedule = "cosine", max = 2e-3 }
replay  = { fraction = 0.25 }
END
}

start_server() {
    mkdir -p server
    : >server/control
    "$python" "$root/tests/s3_server.py" server >server/port 2>server/log &
    server=$!
    until [[ -s server/port ]]; do sleep 0.1; done
    export AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test AWS_DEFAULT_REGION=us-east-1
    export AWS_ENDPOINT_URL=http://127.0.0.1:$(<server/port)
    echo "serving at $AWS_ENDPOINT_URL"
}

checkpoints_in_bucket() {
    "$python" - <<'END'
import fsspec

names = fsspec.filesystem("s3", use_listings_cache=False).find("bucket/runs/remote")
folders = sorted({name.rpartition("/")[0] for name in names if "/step-" in name})
for folder in folders:
    files = [name for name in names if name.startswith(f"{folder}/")]
    whole = f"{folder}/manifest.json" in names
    print(f"s3://{folder}: {len(files)} files, {'complete' if whole else 'no manifest: not a checkpoint'}")
print(f"beside them: {', '.join(name.rpartition('/')[2] for name in names if '/step-' not in name)}")
END
}

main "$@"
