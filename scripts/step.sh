#!/usr/bin/env bash
# Functions of the steps, which source this file with $project set to the project's folder:
#     run SCRIPT [ARGUMENTS]      run one process, which computes its result again if SLURM restarts the job
#     train SCRIPT [ARGUMENTS]    run one process per SLURM task, or one without SLURM; resumes an interrupted run, and
#                                 creates the file 'finished' in its output folder after the last epoch
# PYTHON selects a Python other than that of .venv.
set -euo pipefail

python=${PYTHON:-$project/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
    echo "error: there is no $python; run 'bash scripts/setup.sh' in the project's folder, or set PYTHON" >&2
    exit 2
fi
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

train_in_job() { # COMMAND: run it under srun, forward signals to it, and set $status
    local child warned='' stopped='' task
    # After an error in one task the others would wait for it. srun ends them at once, and loses the error message of
    # the task that failed if that has not passed through yet.
    # shellcheck disable=SC2016 # for the shell of the task to expand
    task='trap : USR2 TERM; "$@" || { status=$?; sleep 2; exit $status; }'
    srun --kill-on-bad-exit=1 bash -c "$task" bash "$@" &
    child=$!
    # Only the batch script is warned of the time limit (--signal=B:); SIGTERM comes with scancel and preemption. srun
    # forwards SIGUSR2 to the tasks; after SIGTERM it would kill them before they have saved.
    trap 'warned=yes stopped=yes; kill -USR2 "$child"' USR2
    trap 'stopped=yes; kill -USR2 "$child"' TERM
    while status=0; wait "$child" || status=$?; kill -0 "$child" 2>/dev/null; do :; done
    # Stopped tasks leave with 75 once the run is saved; the first one to leave may get the others killed.
    [ -z "$stopped" ] || [ "$status" -le 128 ] || status=75
    if [ "$status" = 75 ] && [ -n "$warned" ]; then
        echo "job $SLURM_JOB_ID has saved and is requeued; it resumes when it starts again"
        trap - USR2 TERM
        scontrol requeue "$SLURM_JOB_ID" && sleep 600 # until SLURM ends this script: an exit status might be recorded
    fi
}

finish() { # SCRIPT: exit with $status, and say what a failure means for dependent jobs
    if [ -n "${SLURM_JOB_ID:-}" ] && [ "$status" != 0 ] && [ "$status" != 75 ]; then
        echo "$1 failed with status $status. Dependent jobs are canceled; fix the error and submit again." >&2
    fi
    exit "$status"
}
