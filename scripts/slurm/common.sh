# shellcheck shell=bash
# Shared by train.sbatch and sweep.sbatch: the environment of a job, its job step, and whether it is queued again.

readonly stopped_early=75 mistake=2

say() {
    printf '%s: %s\n' "${SLURM_JOB_NAME:-slurm}" "$@" >&2
}

# Source TITAN_CPT_SETUP, which may set `srun_options` and `launcher`, and export what needs scontrol, because a
# container has none.
prepare_job() {
    local hosts limit
    job=$SLURM_JOB_ID
    # SLURM_JOB_ID of an array's last task is the id of the array: scancel and scontrol would act on all tasks.
    [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    failures=${SLURM_SUBMIT_DIR:-$PWD}/.slurm-$job.failures
    srun_options=() launcher=()
    if [[ -n ${TITAN_CPT_SETUP:-} ]]; then
        [[ -r $TITAN_CPT_SETUP ]] || { say "TITAN_CPT_SETUP: cannot read $TITAN_CPT_SETUP" && exit "$mistake"; }
        set +eu # module and conda do not work with them
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

# Print the number of CPUs of the smallest node. On clusters that bind tasks to cores, a task gets one core unless srun
# requests more, and srun does not inherit --cpus-per-task from sbatch (Slurm 22.05 and newer).
cpus_per_node() {
    local fewest="" count
    for count in $(tr ',' '\n' <<<"${SLURM_JOB_CPUS_PER_NODE:-1}" | sed 's/(.*//'); do
        [[ -n $fewest ]] && ((fewest <= count)) || fewest=$count
    done
    echo "$fewest"
}

# Run a command once on every node, then exit or queue the job again.
run_step() {
    local status label=()
    step="" requested=""
    ((${SLURM_JOB_NUM_NODES:-1} == 1)) || label=(--label)
    trap 'stop USR1' USR1 # shortly before the time limit
    trap 'stop TERM' TERM # Slurm ends the job: scancel, preemption, the time limit
    # --wait: after the first node has ended, the others have this many seconds to end.
    srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-$(cpus_per_node)}" --kill-on-bad-exit=0 \
        --wait="${SLURM_WAIT:-900}" ${label[@]+"${label[@]}"} ${srun_options[@]+"${srun_options[@]}"} \
        ${launcher[@]+"${launcher[@]}"} "$@" &
    step=$!
    [[ -z $requested ]] || stop "$requested"
    while :; do
        signalled=""
        wait "$step" && status=0 || status=$?
        [[ -n $signalled ]] || break # a signal interrupts `wait`, not the step
    done
    finish "$status"
}

# Signal the step to save and stop. The signal does not go to srun, which would kill the step on SIGTERM.
stop() {
    local steps tries
    signalled=$1
    if [[ $1 == TERM && $(state) != RUNNING ]]; then
        # Slurm has sent SIGTERM to the step as well, and kills it after KillWait (30 s unless the cluster changed it).
        say "SIGTERM: Slurm is ending this job"
        if [[ $requested == USR1 && -n $deadline ]] && (($(date +%s) >= deadline - 5)); then
            say "time limit reached before everything was saved; the run resumes from its last checkpoint"
            queue_again
        fi
        return 0 # a return without a status in a trap has that of the interrupted command
    fi
    requested=$1
    [[ -n $step ]] || return 0
    say "SIG$1: signaling the run to save and stop"
    for ((tries = 0; tries < 120; tries++)); do
        steps=$(squeue -h -s -j "$job" -o %i 2>/dev/null | grep -v -e batch -e extern -e interactive) || steps=""
        # shellcheck disable=SC2086
        [[ -z $steps ]] || { scancel --signal=TERM $steps && return 0; }
        kill -0 "$step" 2>/dev/null || return 0
        sleep 1 # the step has not started yet
    done
}

# Print the state of the job: RUNNING, COMPLETING (Slurm is ending it), ...; RUNNING if Slurm does not answer.
state() {
    local found
    found=$(squeue -h -j "$job" -o %T 2>/dev/null) || found=""
    echo "${found:-RUNNING}"
}

# finish STATUS: exit with it; queue the job again after a stop by a signal or a failure that may be the cluster's.
finish() {
    local status=$1 count
    if ((status == 0)); then
        rm -f -- "$failures"
    elif [[ $(state) != RUNNING ]]; then
        say "ended with status $status; Slurm itself queues a preempted job again, but not a cancelled one"
    elif ((status == mistake)); then
        say "the error above would occur again: not queued again"
    elif ((status == stopped_early)) || [[ -n $requested ]]; then
        rm -f -- "$failures"
        say "stopped with status $status; the last checkpoint is complete"
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
        say "was queued again $restarts times (MAX_REQUEUES); to resume, submit the same command again"
        return 0
    fi
    say "queueing job $job again"
    scontrol requeue "$job" || say "Slurm refused to; to resume, submit the same command again"
}
