# shellcheck shell=bash
# What train.sbatch and sweep.sbatch share: the environment of a job, its step, and what becomes of the job afterwards.

readonly stopped_early=75 mistake=2

say() {
    printf '%s: %s\n' "${SLURM_JOB_NAME:-slurm}" "$@" >&2
}

# Source TITAN_CPT_SETUP, which may set `srun_options` and `launcher`, and set what every node needs from the first one,
# as a container has no scontrol.
prepare_job() {
    local hosts limit
    job=$SLURM_JOB_ID
    # The last task of an array has the whole array's number: without the task, scancel and scontrol would take all.
    [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    failures=${SLURM_SUBMIT_DIR:-$PWD}/.slurm-$job.failures
    srun_options=() launcher=()
    if [[ -n ${TITAN_CPT_SETUP:-} ]]; then
        [[ -r $TITAN_CPT_SETUP ]] || { say "TITAN_CPT_SETUP: cannot read $TITAN_CPT_SETUP" && exit "$mistake"; }
        set +eu # module and conda are not written for them
        # shellcheck source=/dev/null
        source "$TITAN_CPT_SETUP"
        set -eu
    fi
    export NPROC=${NPROC:-gpu}
    if [[ -z ${MASTER_ADDR:-} ]]; then
        hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
        export MASTER_ADDR=${hosts%%$'\n'*}
    fi
    limit=$(squeue -h -j "$job" -o %e 2>/dev/null) || limit=""
    deadline=$(date -d "$limit" +%s 2>/dev/null) || deadline=""
    [[ -n $limit ]] || deadline=""
}

# CPUs of the node with the fewest. Where the cluster binds tasks to cores, a task has one unless srun asks for more, and
# srun does not take --cpus-per-task over from sbatch (Slurm 22.05 and newer).
cpus_per_node() {
    local fewest="" count
    for count in $(tr ',' '\n' <<<"${SLURM_JOB_CPUS_PER_NODE:-1}" | sed 's/(.*//'); do
        [[ -n $fewest ]] && ((fewest <= count)) || fewest=$count
    done
    echo "$fewest"
}

# Run a command once on every node and decide what becomes of the job.
run_step() {
    local status label=()
    step="" asked=""
    ((${SLURM_JOB_NUM_NODES:-1} == 1)) || label=(--label)
    trap 'stop USR1' USR1 # the time is nearly up
    trap 'stop TERM' TERM # Slurm ends the job: scancel, preemption, the time limit
    # --wait: when a node has ended, the others have as long to end too, and do not wait for it for ever.
    srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-$(cpus_per_node)}" --kill-on-bad-exit=0 \
        --wait="${SLURM_WAIT:-900}" ${label[@]+"${label[@]}"} ${srun_options[@]+"${srun_options[@]}"} \
        ${launcher[@]+"${launcher[@]}"} "$@" &
    step=$!
    [[ -z $asked ]] || stop "$asked"
    while :; do
        signalled=""
        wait "$step" && status=0 || status=$?
        [[ -n $signalled ]] || break # a signal ends the waiting, not the step
    done
    finish "$status"
}

# Ask the step to save and stop. Not by a signal to srun, which would answer SIGTERM by killing the step.
stop() {
    local steps tries
    signalled=$1
    if [[ $1 == TERM && $(state) != RUNNING ]]; then
        # Slurm has sent SIGTERM to the step as well, and kills it after KillWait (30 s unless the cluster changed it).
        say "SIGTERM: Slurm is ending this job"
        if [[ $asked == USR1 && -n $deadline ]] && (($(date +%s) >= deadline - 5)); then
            say "the time is up before everything was saved; the last checkpoint counts"
            queue_again
        fi
        return 0 # a bare return in a trap has the status of what the signal interrupted
    fi
    asked=$1
    [[ -n $step ]] || return 0
    say "SIG$1: asking the run to save and stop"
    for ((tries = 0; tries < 120; tries++)); do
        steps=$(squeue -h -s -j "$job" -o %i 2>/dev/null | grep -v -e batch -e extern -e interactive) || steps=""
        # shellcheck disable=SC2086
        [[ -z $steps ]] || { scancel --signal=TERM $steps && return 0; }
        kill -0 "$step" 2>/dev/null || return 0
        sleep 1 # the step has not begun yet
    done
}

# RUNNING, COMPLETING (Slurm is ending the job), ...; RUNNING where Slurm does not answer.
state() {
    local found
    found=$(squeue -h -j "$job" -o %T 2>/dev/null) || found=""
    echo "${found:-RUNNING}"
}

# finish STATUS: exit with it; after a stop on a signal, or a failure that may be the cluster's, queue the job again.
finish() {
    local status=$1 count
    if ((status == 0)); then
        rm -f -- "$failures"
    elif [[ $(state) != RUNNING ]]; then
        say "ended with status $status; Slurm queues a preempted job again by itself, and never one that was cancelled"
    elif ((status == mistake)); then
        say "a mistake that another start would repeat: not queued again"
    elif ((status == stopped_early)) || [[ -n $asked ]]; then
        rm -f -- "$failures"
        say "stopped with status $status; the last checkpoint is whole"
        queue_again
    else
        count=$(($(cat -- "$failures" 2>/dev/null || echo 0) + 1))
        say "failure $count in a row, with status $status; MAX_FAILURES is ${MAX_FAILURES:-3}"
        if ((count <= ${MAX_FAILURES:-3})) && echo "$count" >"$failures"; then
            queue_again
        else
            rm -f -- "$failures"
        fi
    fi
    exit "$status"
}

queue_again() {
    local restarts=${SLURM_RESTART_COUNT:-0} most=${MAX_REQUEUES:-100}
    if ((restarts >= most)); then
        say "was queued again $restarts times, which is MAX_REQUEUES; to resume, submit the same command anew"
        return 0
    fi
    say "queueing job $job again"
    scontrol requeue "$job" || say "Slurm refused that; to resume, submit the same command anew"
}
