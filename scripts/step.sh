#!/usr/bin/env bash
# Functions of the steps, which source this file with $project set to the project's folder:
#     run SCRIPT [ARGUMENTS]      run one process, which computes its result again if SLURM restarts the job
#     train SCRIPT [ARGUMENTS]    run one process per SLURM task, or one without SLURM; resumes an interrupted run, and
#                                 creates the file 'finished' in its output folder after the last epoch
#     take_share                  set the array shard to the flags by which the tasks of a job array share the work
#     fail MESSAGE                print the message and exit with status 2
# PYTHON selects a Python other than that of .venv.
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 2
}

python=${PYTHON:-$project/.venv/bin/python}
command -v "$python" >/dev/null ||
    fail "there is no $python; run 'bash scripts/setup.sh' in the project's folder, or set PYTHON"
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not inherit it from sbatch

run() {
    local again=()
    [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || again=(--overwrite)
    status=0
    "$python" "$project/$1" "${@:2}" "${again[@]}" || status=$?
    finish "$1"
}

train() {
    local command=("$python" "$project/$1" "${@:2}" --resume)
    status=0
    if [ -z "${SLURM_JOB_ID:-}" ]; then
        "${command[@]}" || status=$? # in the foreground, where Ctrl-C reaches it
    else
        train_in_job "${command[@]}"
    fi
    [ "$status" != 0 ] || mark_finished "${@:2}"
    finish "$1"
}

mark_finished() { # ARGUMENTS: unless they are for no training, create 'finished' in the output folder they name
    local folder='' previous='' argument
    for argument; do
        case $argument in
        --evaluate | --help | -h) return ;;
        --save-dir=*) folder=${argument#*=} ;;
        *) [ "$previous" != --save-dir ] || folder=$argument ;; # of several the last one counts
        esac
        previous=$argument
    done
    [ ! -e "$folder/last.tar" ] || touch "$folder/finished"
}

train_in_job() { # COMMAND: run it in all tasks, forward signals to them, and set $status
    local child warned='' stopped='' first address
    read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p') # its name need not be a host name
    # After an error in one task the others would wait for it: srun ends them at once.
    srun --kill-on-bad-exit=1 bash -c "$(declare -f task); task \"\$@\"" bash \
        "$address" $((20000 + SLURM_JOB_ID % 12000)) "$@" &
    child=$!
    # Only the batch script is warned of the time limit (--signal=B:); SIGTERM comes with scancel and preemption. srun
    # forwards SIGUSR2 to the tasks; after SIGTERM it would kill them before they have saved.
    trap 'warned=yes stopped=yes; kill -USR2 "$child"' USR2
    trap 'stopped=yes; kill -USR2 "$child"' TERM
    while status=0; wait "$child" || status=$?; kill -0 "$child" 2>/dev/null; do :; done
    # Stopped tasks leave with 75 once the run is saved; the first one to leave may get the others killed.
    [ -z "$stopped" ] || [ "$status" -le 128 ] || status=75
    if [ "$status" = 75 ] && [ -n "$warned" ]; then
        echo "job $SLURM_JOB_ID has saved, and asks SLURM to requeue it; it resumes when it starts again"
        trap - USR2 TERM
        if scontrol requeue "$SLURM_JOB_ID"; then
            sleep 600 # until SLURM ends this script: an exit status might be recorded
        else
            echo "job $SLURM_JOB_ID could not be requeued; submit it again to resume" >&2
        fi
    fi
}

task() { # ADDRESS PORT COMMAND: run a task of several with torchrun's variables; ADDRESS is that of the first node
    local address=$1 port=$2 status
    shift 2
    trap : USR2 TERM
    if [ "$SLURM_NTASKS" = 1 ]; then
        : # which starts a process per GPU
    elif [[ $SLURM_NTASKS = "$SLURM_NNODES" && ${SLURM_GPUS_ON_NODE:-0} -gt 1 ]]; then # as does each of these
        set -- "$@" --world-size "$SLURM_NNODES" --rank "$SLURM_PROCID" --dist-url "tcp://$address:$port"
    else
        export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
        export LOCAL_WORLD_SIZE=$(((SLURM_NTASKS + SLURM_NNODES - 1) / SLURM_NNODES))
        export MASTER_ADDR=$address MASTER_PORT=$port
    fi
    "$@" || {
        status=$?
        sleep 2 # srun, which ends the other tasks, would lose an error message that has not passed through yet
        exit $status
    }
}

# shellcheck disable=SC2034,SC2153 # the step uses shard; SLURM sets the others
take_share() {
    shard=()
    [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || return 0
    local first=$SLURM_ARRAY_TASK_MIN count=$SLURM_ARRAY_TASK_COUNT
    [[ $first -le 1 && $((SLURM_ARRAY_TASK_MAX - first + 1)) = "$count" ]] ||
        fail "the tasks of an array share the work if it is --array=0-N or 1-N; submit all of it, what is done is skipped"
    shard=(--shard "$((SLURM_ARRAY_TASK_ID - first))/$count")
}

# shellcheck disable=SC2153 # chain.sh sets RECORD and COMMAND
finish() { # SCRIPT: exit with $status, record a success for chain.sh, and say what a failure means for dependent jobs
    [ "$status" != 0 ] || [ -z "${RECORD:-}" ] || echo "$COMMAND" >"$RECORD"
    if [ -n "${SLURM_JOB_ID:-}" ] && [ "$status" != 0 ] && [ "$status" != 75 ]; then
        echo "$1 failed with status $status. Dependent jobs are canceled; fix the error and submit again." >&2
    fi
    exit "$status"
}
