#!/usr/bin/env bash
# Train a config on one process, on one node or on several nodes.
#
#   ./run_train.sh                                               the quick start (train_configs/quickstart.toml)
#   ./run_train.sh FILE [--training.seq_len 512 ...]             any config; keys can be overridden
#   NPROC=8 ./run_train.sh FILE                                  eight processes on this node
#   ./run_train.sh --help                                        this text, and the options of `titan-cpt train`
#
# Environment:
#   NPROC         processes per node, one per device (default 1); "gpu": one per GPU of this node
#   NNODES        number of nodes (default: Slurm's, else 1); start this script once on every node
#   NODE_RANK     rank of this node, from 0 (default: Slurm's)
#   MASTER_ADDR   host name or address of node 0 (default: the first of Slurm's nodes)
#   MASTER_PORT   a free port of node 0 (default: computed from Slurm's job id, else 29500)
#   MAX_RESTARTS  how often torchrun restarts all processes after one has failed (default 0)
#   LOG_RANK      local ranks whose output is printed, comma-separated (default 0)
#   OMP_NUM_THREADS   CPU threads of each process if there are several (default: cores / NPROC)
#
# titan_cpt writes <run folder>/logs/rank-<rank>.log: what each rank prints, of all sessions. With several processes, and
# under Slurm, this script also keeps all output of a node, as of NCCL and torchrun, in
# <run folder>/logs/<attempt>/node-<rank>-<host>/: what is printed in console.txt (unless it goes to a terminal), and one
# folder for each process that is not printed. --quiet and --verbose are options of titan_cpt.
#
# Paths are relative to the working directory. Exit status: 0 done; 2 the user's mistake; 75 stopped by a signal with
# everything saved (the same command resumes); 1 anything else.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
readonly root

main() {
    local argument has_config=""
    quiet=""
    # The file stands first, or has the usual ending; titan_cpt reports all other words.
    [[ $# == 0 || $1 == -* ]] || has_config=yes
    for argument in "$@"; do
        [[ $argument != -h && $argument != --help ]] || show_help
        [[ $argument != --quiet ]] || quiet=yes
        [[ $argument != --config && $argument != --config=* && ($argument == -* || $argument != *.toml) ]] || has_config=yes
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
    for argument in "$@"; do
        [[ $argument != --dry-run ]] || WORLD_SIZE=$((nproc * nnodes)) exec "$python" -m titan_cpt train "$@"
    done
    if ((nproc == 1 && nnodes == 1)) && [[ -z ${SLURM_JOB_ID:-} || -t 1 ]]; then
        # The training process replaces this script: it receives the signals, and its exit status is that of the script.
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

# Print the comment at the top of this script and the options of `titan-cpt train`, and exit.
show_help() {
    sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
    echo
    find_python
    exec "$python" -m titan_cpt train --help
}

fail() {
    printf 'run_train.sh: %s\n' "$@" >&2
    exit 2
}

# Print a command before it runs, unless --quiet is given.
show() {
    [[ -z $quiet ]] || return 0
    {
        printf '+'
        printf ' %q' "$@"
        printf '\n'
    } >&2
}

check_count() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 must be a whole number from 1, got '$2'"
}

# Print the number of GPUs for this run: those that Slurm allocated, else all of this node, in either case no more than
# CUDA_VISIBLE_DEVICES lists; 1 if there is none, for the CPU. titan_cpt refuses an NPROC above the number that torch
# finds.
count_gpus() {
    local found=${SLURM_GPUS_ON_NODE:-} visible
    [[ -n $found ]] || found=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        visible=$(count_visible_devices)
        ((visible >= found)) || found=$visible
    fi
    if ! ((found)); then
        printf 'run_train.sh: NPROC=gpu, but this node has no GPU: training with one process on the CPU\n' >&2
        found=1
    fi
    echo "$found"
}

# Print the number of devices in CUDA_VISIBLE_DEVICES: CUDA ignores the first that is not a device (-1, NoDevFiles) and
# all after it. Of several MIG devices a process sees one.
count_visible_devices() {
    local devices device count=0
    IFS=, read -r -a devices <<<"${CUDA_VISIBLE_DEVICES// /}"
    for device in "${devices[@]}"; do
        [[ $device =~ ^([0-9]+|GPU-.+|MIG-.+)$ ]] || break
        count=$((count + 1))
        [[ $device != MIG-* ]] || break
    done
    echo "$count"
}

# Set `python` to an interpreter with titan_cpt: the active environment's, else .venv's, else the one on PATH, as in a
# container.
find_python() {
    local candidate tried=()
    for candidate in ${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin/python"} ${CONDA_PREFIX:+"$CONDA_PREFIX/bin/python"} \
        "$root/.venv/bin/python" "$(type -P python || true)" "$(type -P python3 || true)"; do
        [[ -x $candidate && " ${tried[*]-} " != *" $candidate "* ]] || continue
        python=$candidate
        has_titan_cpt "$python" && return
        tried+=("$candidate")
    done
    fail "found no Python with titan_cpt and torch; tried: ${tried[*]:-none exists}." \
        "Activate the environment that has them, or install both into $root/.venv: $root/scripts/setup.sh" \
        "In a container with torch: pip install -e $root"
}

# Whether titan_cpt is installed; a checkout in the working directory without its requirements does not count.
has_titan_cpt() {
    "$1" -c '
import importlib.util, sys
sys.path[:] = [path for path in sys.path if path]
sys.exit(not all(map(importlib.util.find_spec, ("titan_cpt", "torch"))))'
}

# Set `rendezvous` to the torchrun options with which the nodes find each other.
rendezvous_options() {
    if (($1 == 1)); then
        rendezvous=(--standalone)
        return
    fi
    local node_rank=${NODE_RANK:-${SLURM_NODEID:-}} address=${MASTER_ADDR:-} port=${MASTER_PORT:-} hosts
    if ! [[ $node_rank =~ ^(0|[1-9][0-9]*)$ ]] || ((node_rank >= $1)); then
        fail "NODE_RANK must be this node's rank, from 0 to $(($1 - 1)) with NNODES=$1; got '$node_rank'"
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
    if ! [[ $port =~ ^[1-9][0-9]{0,4}$ ]] || ((port > 65535)); then
        fail "MASTER_PORT must be a port of node 0, from 1 to 65535; got '$port'"
    fi
    master="$address:$port" node="$node_rank/$1@$address:$port"
    if ((${MAX_RESTARTS:-0})); then
        # Only this rendezvous restarts all nodes when one of them restarts; it assigns the node ranks itself.
        rendezvous=(--rdzv-backend=c10d --rdzv-endpoint="$master" --rdzv-id="${SLURM_JOB_ID:-titan_cpt}")
        rendezvous_host=$((node_rank == 0))
    else
        rendezvous=(--node-rank="$node_rank" --master-addr="$address" --master-port="$port")
    fi
}

# read_run_info NODES TRAIN_OPTION...: set `run_folder` and `init_timeout` from the config. An error in the config is
# printed and ends this script; with several nodes titan_cpt.commands.launch prints it instead, once for all nodes.
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

# Set `logs` to the folder for the logs of this node's processes, and copy this script's own output into it.
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
        logs=$(mktemp -d "${TMPDIR:-/tmp}/titan_cpt.XXXXXX") # titan_cpt prints why the run folder cannot be written
        temporary=yes
    fi
    trap clean_up EXIT
    [[ -t 1 ]] || keep_console
    # After keep_console: has_processes finds the training processes by it. Absolute, since a run of the same name that
    # began in the same second in another folder would have the same relative path.
    TITAN_CPT_STATUS_FILE="$(cd -- "$logs" && pwd -P)/status"
    export TITAN_CPT_STATUS_FILE
    rm -f -- "$TITAN_CPT_STATUS_FILE" "$TITAN_CPT_STATUS_FILE".process-*
}

# Copy the output of this script and its processes to console.txt. The copying ends when the last of them ends; it
# ignores the signals that Slurm sends to every process of a step.
keep_console() {
    exec 3>&1 4>&2
    exec > >(trap '' TERM INT HUP USR1 && exec tee -a -- "$logs/console.txt" >&3 3>&- 4>&-)
    console+=($!)
    exec 2> >(trap '' TERM INT HUP USR1 && exec tee -a -- "$logs/console.txt" >&4 3>&- 4>&-)
    console+=($!)
}

# Remove empty logs and temporary files.
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
        rmdir -- "${logs%/*}" "$run_folder/logs" 2>/dev/null || true # if no node has logs
    fi
}

# run_torchrun NPROC TORCHRUN_OPTION... -- TRAIN_OPTION...: run titan_cpt under torchrun and exit with the status of
# titan_cpt. torchrun exits with 1 on every failure, so titan_cpt writes its status to TITAN_CPT_STATUS_FILE.
run_torchrun() {
    local nproc=$1 log_rank=${LOG_RANK:-0} options=() rank
    shift
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift

    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads_per_process "$nproc")}
    # A stop by a signal saves a checkpoint first; torchrun's default of 30 s would kill a large model while it saves.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}
    # Ranks that torchrun restarts (--max-restarts) must not read stale addresses of earlier ranks from its store.
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
    # Output that is not printed goes to files: a failure may be visible in one of these processes only.
    [[ -z $hidden ]] || options+=(--redirects="$hidden")
    # torchrun with early checks and short error messages.
    local launch=("$python" -m titan_cpt.commands.launch)
    [[ -z ${node:-} ]] || launch+=(--node="$node" --patience="$init_timeout")
    run_and_exit "${launch[@]}" "${options[@]}" -m titan_cpt train "$@"
}

# Run a command, forward signals to it, wait until it has saved and ended, and exit with the status of titan_cpt.
run_and_exit() {
    local status=0 written=""
    show "$@"
    child="" interrupted="" stopping=""
    trap 'forward TERM' TERM
    trap 'forward TERM' USR1 # sent by Slurm before a time limit; torchrun does not handle it
    trap 'forward INT' INT
    # A process group of its own: a Ctrl-C reaches it once, through this script, and not from the terminal as well.
    set -m
    "$@" 3>&- 4>&- &
    child=$!
    set +m
    [[ -z $interrupted ]] || forward "$interrupted"
    while :; do
        interrupted=""
        wait "$child" && status=0 || status=$?
        [[ -n $interrupted ]] || break # a signal interrupts `wait`, not the run
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

# Forward a signal to the command; one that arrives before the command has started is forwarded when it has.
forward() {
    interrupted=$1 stopping=yes
    [[ -z $child ]] || kill -s "$1" "$child" 2>/dev/null || true
}

# torchrun exits at a second signal (Slurm signals each process of a step) while its processes still save.
wait_for_processes() {
    local tries=$((TORCH_ELASTIC_SHUTDOWN_TIMEOUT * 2))
    while ((tries-- > 0)) && has_processes; do
        sleep 0.5
    done
}

# Whether a process on this node still has this TITAN_CPT_STATUS_FILE in its environment, as those of torchrun have.
has_processes() {
    env -u TITAN_CPT_STATUS_FILE grep -qzsxF -- "TITAN_CPT_STATUS_FILE=$TITAN_CPT_STATUS_FILE" \
        /proc/[0-9]*/environ
}

threads_per_process() {
    local cores
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
    echo $((cores > $1 ? cores / $1 : 1))
}

# show_hidden_errors STATUS: after a failure, print the last output of the processes that were not printed, each text
# once. A process that ended with a message wrote it to a file; after the user's mistake (2) the messages suffice.
show_hidden_errors() {
    local file last said=" " has_message="" rank
    for file in "$TITAN_CPT_STATUS_FILE".process-*; do
        [[ -s $file ]] || continue
        has_message=yes
        [[ ",${LOG_RANK:-0}," != *",${file##*-},"* ]] || is_new "$(<"$file")" || true
    done
    while IFS= read -r file; do
        rank=$(basename -- "$(dirname -- "$file")")
        if [[ -f $TITAN_CPT_STATUS_FILE.process-$rank ]]; then
            last=$(<"$TITAN_CPT_STATUS_FILE.process-$rank")
            [[ -n $last ]] || continue
        elif (($1 == 2)) && [[ $has_message ]]; then
            continue
        else
            last=$(tail -n 20 -- "$file")
        fi
        is_new "$last" || continue
        printf 'run_train.sh: last output of process %s of this node:\n' "$rank"
        printf '%s\n' "$last"
    done < <(find "$logs" -name stderr.log -size +0 2>/dev/null | sort) >&2
}

# Whether a text is new; its checksum is added to `said`.
is_new() {
    local sum
    sum=$(cksum <<<"$1")
    [[ $said != *" $sum "* ]] || return 1
    said+="$sum "
}

main "$@"
