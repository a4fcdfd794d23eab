#!/usr/bin/env bash
# Train what a config describes, on one process, one node or many.
#
#   ./run_train.sh                                               the quick start (train_configs/quickstart.toml)
#   ./run_train.sh --config FILE [--training.seq_len 512 ...]    any config; overrides pass through
#   NPROC=8 ./run_train.sh --config FILE                         eight processes on this node
#
# Environment:
#   NPROC         processes on each node, one per device (default 1); "gpu" counts this node's GPUs
#   NNODES        nodes (default: Slurm's number, else 1); start this script once on every node
#   NODE_RANK     this node's number, from 0 (default: Slurm's)
#   MASTER_ADDR   a name or address of node 0 (default: the first of Slurm's nodes)
#   MASTER_PORT   a free port there (default: one made from Slurm's job number, else 29500)
#   MAX_RESTARTS  times that torchrun may start all processes again after one of them failed (default 0)
#   LOG_RANK      the processes of each node whose output is shown, comma-separated (default 0)
#   OMP_NUM_THREADS   threads of each of several processes (default: cores / NPROC)
#
# Several processes, and any under Slurm, keep what they write in <run folder>/logs/<attempt>/node-<rank>-<host>/:
# console.txt (what is shown, unless that is a terminal) and a folder for each process that is not shown.
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
    [[ $nproc != gpu ]] || nproc=$(count_gpus)
    check_count NPROC "$nproc"
    check_count NNODES "$nnodes"
    [[ ${MAX_RESTARTS:-0} =~ ^(0|[1-9][0-9]*)$ ]] ||
        fail "MAX_RESTARTS must be a whole number from 0, got '$MAX_RESTARTS'"
    [[ ${SLURM_LOCALID:-0} == 0 ]] ||
        fail "Slurm started this more than once on a node; use srun --ntasks-per-node=1 and NPROC for the processes"

    find_python
    if ((nproc == 1 && nnodes == 1)) && [[ -z ${SLURM_JOB_ID:-} || -t 1 ]]; then
        # The process itself takes this script's place, so that signals and the exit status are its own.
        show "$python" -m titan_cpt train "$@"
        exec "$python" -m titan_cpt train "$@"
    fi
    local rendezvous=()
    rendezvous_options "$nnodes"
    read_run_info "$nnodes" "$@"
    make_logs
    if ((nproc == 1 && nnodes == 1)); then
        run_and_exit "$python" -m titan_cpt train "$@"
    fi
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

# GPUs of this node: those that Slurm gave it, else all that there are; without any, one process on the CPU.
count_gpus() {
    local found=${SLURM_GPUS_ON_NODE:-}
    [[ -n $found ]] || found=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)
    if ! ((found)); then
        printf 'run_train.sh: NPROC=gpu, and this node has no GPUs: one process on the CPU\n' >&2
        found=1
    fi
    echo "$found"
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
    master="$address:$port" node="$node_rank/$1@$address:$port"
    if ((${MAX_RESTARTS:-0})); then
        # Only this rendezvous lets all nodes start again when one of them does; it numbers the nodes itself.
        rendezvous=(--rdzv-backend=c10d --rdzv-endpoint="$master" --rdzv-id="${SLURM_JOB_ID:-titan_cpt}")
        rendezvous_host=$((node_rank == 0))
    else
        rendezvous=(--node-rank="$node_rank" --master-addr="$address" --master-port="$port")
    fi
}

# read_run_info NODES TRAIN_OPTION...: set `run_folder` and `init_timeout` from the config. A mistake in it is printed and
# ends this script; on several nodes titan_cpt.commands.launch prints it, once for all of them.
read_run_info() {
    local information="" key value nnodes=$1
    shift
    run_folder="" init_timeout=1800
    if ((nnodes == 1)); then
        information=$("$python" -m titan_cpt train --run-info "$@") || exit $?
    else
        information=$("$python" -m titan_cpt train --run-info "$@" 2>/dev/null) || return 0
    fi
    while IFS='=' read -r key value; do
        case $key in
            run_folder) run_folder=$value ;;
            init_timeout_seconds) init_timeout=$value ;;
        esac
    done <<<"$information"
}

# Set `logs` to the folder for what this node's processes write, and copy this script's own output into it.
make_logs() {
    local attempt node=${NODE_RANK:-${SLURM_NODEID:-0}} host
    host=$(hostname -s 2>/dev/null || hostname)
    attempt=$(date +%Y%m%d-%H%M%S)
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        attempt=slurm-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
        attempt+=-start-${SLURM_RESTART_COUNT:-0}
    fi
    logs=$run_folder/logs/$attempt/node-$node-$host temporary="" console=()
    if [[ -z $run_folder ]] || ! mkdir -p -- "$logs" 2>/dev/null || [[ ! -w $logs ]]; then
        logs=$(mktemp -d "${TMPDIR:-/tmp}/titan_cpt.XXXXXX") # titan_cpt says what is wrong with the run's folder
        temporary=yes
    fi
    trap clean_up EXIT
    [[ -t 1 ]] || keep_console
    export TITAN_CPT_STATUS_FILE="$logs/status" # after keep_console: it also tells which processes are the program's
    rm -f -- "$TITAN_CPT_STATUS_FILE" "$TITAN_CPT_STATUS_FILE".process-*
}

# Write what this script and its processes print into console.txt too. The copying ends when the last of them does, and
# not by a signal that Slurm sends to every process of a step.
keep_console() {
    exec 3>&1 4>&2
    exec > >(trap '' TERM INT HUP USR1 && exec tee -a -- "$logs/console.txt" >&3 3>&- 4>&-)
    console+=($!)
    exec 2> >(trap '' TERM INT HUP USR1 && exec tee -a -- "$logs/console.txt" >&4 3>&- 4>&-)
    console+=($!)
}

# Keep the logs that say something, and nothing else.
# shellcheck disable=SC2317 # a trap calls it
clean_up() {
    local process tries
    if ((${#console[@]})); then
        exec 1>&3 2>&4 3>&- 4>&-
        for process in "${console[@]}"; do
            for ((tries = 0; tries < 50; tries++)); do
                kill -0 "$process" 2>/dev/null || break
                sleep 0.1
            done
        done
    fi
    [[ -z ${TITAN_CPT_STATUS_FILE:-} ]] || rm -f -- "$TITAN_CPT_STATUS_FILE" "$TITAN_CPT_STATUS_FILE".process-*
    if [[ -n $temporary ]]; then
        rm -rf -- "$logs"
    else
        find "$logs" -depth \( -type f -empty -o -type d -empty \) -delete 2>/dev/null || true
        rmdir -- "${logs%/*}" "$run_folder/logs" 2>/dev/null || true # where no node had anything to keep
    fi
}

# run_torchrun NPROC TORCHRUN_OPTION... -- TRAIN_OPTION...: run titan_cpt under torchrun and exit with the program's
# status. torchrun turns every failure into 1, so the program leaves its own in TITAN_CPT_STATUS_FILE.
run_torchrun() {
    local nproc=$1 log_rank=${LOG_RANK:-0} options=() rank
    shift
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift

    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads_per_process "$nproc")}
    # A stop on a signal saves a checkpoint first; torchrun's own 30 s would kill a large model in the middle of it.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}
    # Ranks that torchrun starts again (--max-restarts) must not find the addresses of the dead in its store.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    ((${MAX_RESTARTS:-0} == 0)) || options+=(--max-restarts="$MAX_RESTARTS")
    if [[ ${rendezvous_host:-} ]]; then
        options+=(--rdzv-conf="join_timeout=$init_timeout,read_timeout=$init_timeout,is_host=$rendezvous_host")
    elif [[ ${master:-} ]]; then
        options+=(--rdzv-conf="timeout=$init_timeout")
    fi
    options+=(--local-ranks-filter="$log_rank" --log-dir="$logs")
    local hidden=""
    for ((rank = 0; rank < nproc; rank++)); do
        [[ ",$log_rank," == *",$rank,"* ]] || hidden+="${hidden:+,}$rank:3"
    done
    # What is not shown is kept in files, for a failure that only one of these processes sees.
    [[ -z $hidden ]] || options+=(--redirects="$hidden")
    # torchrun, with one message in the place of its log of a failure.
    local launch=("$python" -m titan_cpt.commands.launch)
    [[ -z ${node:-} ]] || launch+=(--node="$node" --patience="$init_timeout")
    run_and_exit "${launch[@]}" "${options[@]}" -m titan_cpt train "$@"
}

# Run a command, pass signals on to it, wait for it however long it takes to save, and exit with the program's status.
run_and_exit() {
    local status=0 written=""
    show "$@"
    child="" interrupted="" stopping=""
    trap 'forward TERM' TERM
    trap 'forward TERM' USR1 # Slurm's, before a time limit; torchrun does not know it
    trap 'forward INT' INT
    # A process group of its own: a Ctrl-C reaches it once, through us, and not from the terminal as well.
    set -m
    "$@" 3>&- 4>&- &
    child=$!
    set +m
    [[ -z $interrupted ]] || forward "$interrupted"
    while :; do
        interrupted=""
        wait "$child" && status=0 || status=$?
        [[ -n $interrupted ]] || break # a signal ends the waiting, not the run
    done
    ((status == 0)) && exit 0
    [[ -z $stopping ]] || wait_for_processes

    [[ ! -f $TITAN_CPT_STATUS_FILE ]] || written=$(<"$TITAN_CPT_STATUS_FILE")
    if ! [[ $written =~ ^[1-9][0-9]{0,2}$ ]] || ((written > 255)); then
        written=1
    fi
    ((written == 75)) || show_hidden_errors "$written"
    exit "$written"
}

# Pass a signal on to the command; one that comes before it has begun is passed on when it has.
forward() {
    interrupted=$1 stopping=yes
    [[ -z $child ]] || kill -s "$1" "$child" 2>/dev/null || true
}

# torchrun leaves at a second signal (Slurm sends them to each process of a step) while its processes still save.
wait_for_processes() {
    local tries=$((TORCH_ELASTIC_SHUTDOWN_TIMEOUT * 2))
    while ((tries-- > 0)) && has_processes; do
        sleep 0.5
    done
}

# Whether a process on this node still has our TITAN_CPT_STATUS_FILE in its environment, as all that torchrun started.
has_processes() {
    env -u TITAN_CPT_STATUS_FILE grep -qzsxF -- "TITAN_CPT_STATUS_FILE=$TITAN_CPT_STATUS_FILE" \
        /proc/[0-9]*/environ
}

threads_per_process() {
    local cores
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
    echo $((cores > $1 ? cores / $1 : 1))
}

# show_hidden_errors STATUS: after a failure, what the processes whose output was not shown said last, each text once. A
# process that ended with a message left it in a file; after the user's mistake (2) no more is needed than messages.
show_hidden_errors() {
    local file last said=" " told="" rank
    for file in "$TITAN_CPT_STATUS_FILE".process-*; do
        [[ -s $file ]] || continue
        told=yes
        [[ ",${LOG_RANK:-0}," != *",${file##*-},"* ]] || is_new "$(<"$file")" || true
    done
    while IFS= read -r file; do
        rank=$(basename -- "$(dirname -- "$file")")
        if [[ -f $TITAN_CPT_STATUS_FILE.process-$rank ]]; then
            last=$(<"$TITAN_CPT_STATUS_FILE.process-$rank")
            [[ -n $last ]] || continue
        elif (($1 == 2)) && [[ $told ]]; then
            continue
        else
            last=$(tail -n 20 -- "$file")
        fi
        is_new "$last" || continue
        printf 'run_train.sh: the end of what process %s of this node wrote:\n' "$rank"
        printf '%s\n' "$last"
    done < <(find "$logs" -name stderr.log -size +0 2>/dev/null | sort) >&2
}

# Whether a text is not among those in `said` yet, to which it is added.
is_new() {
    local sum
    sum=$(cksum <<<"$1")
    [[ $said != *" $sum "* ]] || return 1
    said+="$sum "
}

main "$@"
