#!/usr/bin/env bash
# Train what a config describes, on one process, one node or many.
#
#   ./run_train.sh                                               the quick start (train_configs/quickstart.toml)
#   ./run_train.sh --config FILE [--training.seq_len 512 ...]    any config; overrides pass through
#   NPROC=8 ./run_train.sh --config FILE                         eight processes on this node
#
# Environment:
#   NPROC         processes on each node, one per device (default 1)
#   NNODES        nodes (default: Slurm's number, else 1); start this script once on every node
#   NODE_RANK     this node's number, from 0 (default: Slurm's)
#   MASTER_ADDR   a name or address of node 0 (default: the first of Slurm's nodes)
#   MASTER_PORT   a free port there (default: one made from Slurm's job number, else 29500)
#   LOG_RANK      the processes of each node whose output is shown, comma-separated (default 0)
#   OMP_NUM_THREADS   threads of each of several processes (default: cores / NPROC)
#
# Paths are relative to the working directory. Exit status: 0 done; 2 the user's mistake; 75 stopped on a signal with
# everything saved (run the same command again to go on); 1 anything else.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
readonly root

main() {
    local argument has_config=""
    for argument in "$@"; do
        [[ $argument == --config || $argument == --config=* ]] && has_config=yes
    done
    [[ -n $has_config ]] || set -- --config "$root/train_configs/quickstart.toml" "$@"

    local nproc=${NPROC:-1} nnodes=${NNODES:-${SLURM_JOB_NUM_NODES:-1}}
    check_count NPROC "$nproc"
    check_count NNODES "$nnodes"
    [[ ${SLURM_LOCALID:-0} == 0 ]] ||
        fail "Slurm started this more than once on a node; use srun --ntasks-per-node=1 and NPROC for the processes"

    find_python
    if ((nproc == 1 && nnodes == 1)); then
        # The process itself takes this script's place, so that signals and the exit status are its own.
        show "$python" -m titan_cpt train "$@"
        exec "$python" -m titan_cpt train "$@"
    fi
    local rendezvous
    rendezvous_options "$nnodes"
    run_torchrun "$nproc" --nnodes="$nnodes" --nproc-per-node="$nproc" "${rendezvous[@]}" -- "$@"
}

fail() {
    printf 'run_train.sh: %s\n' "$@" >&2
    exit 2
}

show() {
    {
        printf '+'
        printf ' %q' "$@"
        printf '\n'
    } >&2
}

check_count() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 must be a whole number from 1, got '$2'"
}

# Set `python` to the interpreter of the active environment if titan_cpt is installed there, else to .venv's.
find_python() {
    local candidate tried=()
    for candidate in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}" "$root/.venv"; do
        python=$candidate/bin/python
        if [[ -n $candidate && -x $python ]]; then
            has_titan_cpt "$python" && return
            tried+=("$candidate")
        fi
    done
    if ((${#tried[@]})); then
        fail "titan_cpt is not installed in ${tried[*]}." "Install it into $root/.venv: $root/scripts/setup.sh"
    fi
    fail "found no Python environment: none is active and $root/.venv does not exist." "Make it: $root/scripts/setup.sh"
}

# Installed, not merely lying in the working directory without the packages that it needs.
has_titan_cpt() {
    "$1" -c '
import importlib.util, sys
sys.path[:] = [path for path in sys.path if path]
sys.exit(not all(map(importlib.util.find_spec, ("titan_cpt", "torch"))))'
}

# Set `rendezvous` to the options by which the nodes find each other.
rendezvous_options() {
    if (($1 == 1)); then
        rendezvous=(--standalone)
        return
    fi
    local node_rank=${NODE_RANK:-${SLURM_NODEID:-}} address=${MASTER_ADDR:-} port=${MASTER_PORT:-} hosts
    if ! [[ $node_rank =~ ^(0|[1-9][0-9]*)$ ]] || ((node_rank >= $1)); then
        fail "NODE_RANK must be this node's number, from 0 to $(($1 - 1)), with NNODES=$1; got '$node_rank'"
    fi
    if [[ -z $address && -n ${SLURM_JOB_NODELIST:-} ]]; then
        hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") ||
            fail "scontrol could not read SLURM_JOB_NODELIST='$SLURM_JOB_NODELIST'; set MASTER_ADDR to the first node"
        address=${hosts%%$'\n'*}
    fi
    [[ -n $address ]] || fail "MASTER_ADDR must name node 0, as all $1 nodes reach it"
    if [[ -z $port ]]; then
        port=29500
        # Jobs that share a node must not share a port.
        [[ ${SLURM_JOB_ID:-} =~ ^[0-9]+$ ]] && port=$((20000 + SLURM_JOB_ID % 10000))
    fi
    rendezvous=(--node-rank="$node_rank" --master-addr="$address" --master-port="$port")
}

# run_torchrun NPROC TORCHRUN_OPTION... -- TRAIN_OPTION...: run titan_cpt under torchrun and exit with the program's
# status. torchrun turns every failure into 1, so the program leaves its own in TITAN_CPT_STATUS_FILE.
run_torchrun() {
    local nproc=$1 log_rank=${LOG_RANK:-0} options=() status=0 rank
    shift
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift

    scratch=$(mktemp -d "${TMPDIR:-/tmp}/titan_cpt.XXXXXX")
    trap 'rm -rf -- "$scratch"' EXIT
    export TITAN_CPT_STATUS_FILE="$scratch/status"
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads_per_process "$nproc")}
    # A stop on a signal saves a checkpoint first; torchrun's own 30 s would kill a large model in the middle of it.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}
    # Ranks that torchrun starts again (--max-restarts) must not find the addresses of the dead in its store.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    options+=(--local-ranks-filter="$log_rank" --log-dir="$scratch/logs")
    local hidden=""
    for ((rank = 0; rank < nproc; rank++)); do
        [[ ",$log_rank," == *",$rank,"* ]] || hidden+="${hidden:+,}$rank:3"
    done
    # What is not shown is kept in files, for a failure that only one of these processes sees.
    [[ -z $hidden ]] || options+=(--redirects="$hidden")

    local command=("$python" -m torch.distributed.run "${options[@]}" -m titan_cpt train "$@")
    show "${command[@]}"
    child="" interrupted=""
    trap 'forward TERM' TERM
    trap 'forward INT' INT
    # A process group of its own: a Ctrl-C reaches it once, through us, and not from the terminal as well.
    set -m
    "${command[@]}" &
    child=$!
    set +m
    [[ -z $interrupted ]] || forward "$interrupted"
    while :; do
        interrupted=""
        wait "$child" && status=0 || status=$?
        [[ -n $interrupted ]] || break # a signal ends the waiting, not the run
    done
    ((status == 0)) && exit 0

    local written=1
    [[ ! -f $TITAN_CPT_STATUS_FILE ]] || written=$(<"$TITAN_CPT_STATUS_FILE")
    if ! [[ $written =~ ^[1-9][0-9]{0,2}$ ]] || ((written > 255)); then
        written=1
    fi
    ((written == 75)) || show_hidden_errors
    exit "$written"
}

# Pass a signal on to torchrun; one that comes before there is a torchrun is passed on when there is.
forward() {
    interrupted=$1
    [[ -z $child ]] || kill -s "$1" "$child" 2>/dev/null || true
}

threads_per_process() {
    local cores
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
    echo $((cores > $1 ? cores / $1 : 1))
}

# After a failure: what the processes whose output was not shown said last; what several said alike, once.
show_hidden_errors() {
    local log last sum said=" "
    while IFS= read -r log; do
        last=$(tail -n 20 -- "$log")
        sum=$(cksum <<<"$last")
        [[ $said == *" $sum "* ]] && continue
        said+="$sum "
        printf 'run_train.sh: the end of what process %s of this node wrote:\n' "$(basename -- "$(dirname -- "$log")")"
        printf '%s\n' "$last"
    done < <(find "$scratch/logs" -name stderr.log -size +0 2>/dev/null | sort) >&2
}

main "$@"
