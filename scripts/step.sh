#!/usr/bin/env bash
# What the steps share; sourced by each of them, with $house set to the project's folder. Gives them
#     run SCRIPT [ARGUMENTS]      one process, which computes its result anew if SLURM starts the job again
#     train SCRIPT [ARGUMENTS]    under SLURM one process for each task of the job, which goes on where it was stopped
# PYTHON chooses another Python than that of .venv.
set -euo pipefail

python=${PYTHON:-$house/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
    echo "error: there is no $python; run 'bash scripts/setup.sh' in the project's folder, or set PYTHON" >&2
    exit 2
fi
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it over from sbatch by itself

run() {
    local again=()
    [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || again=(--overwrite)
    status=0
    "$python" "$house/$1" "${@:2}" "${again[@]}" || status=$?
    finish "$1"
}

train() {
    local command=("$python" "$house/$1" "${@:2}" --resume)
    status=0
    if [ -z "${SLURM_JOB_ID:-}" ]; then
        "${command[@]}" || status=$? # in the foreground, where Ctrl-C reaches it
    else
        train_in_job "${command[@]}"
    fi
    [ "$status" != 0 ] || touch "$SAVE/finished" # for who cannot tell from the checkpoints, whose names may not change
    finish "$1"
}

train_in_job() { # COMMAND: run it under srun, pass signals on, and set $status
    local child warned=
    srun "$@" &
    child=$!
    # The batch script alone is told that its time is up (--signal=B:); SIGTERM comes with scancel and preemption.
    trap 'warned=yes; kill -USR2 "$child"' USR2
    trap 'kill -TERM "$child"' TERM
    while status=0; wait "$child" || status=$?; kill -0 "$child" 2>/dev/null; do :; done
    if [ "$status" = 75 ] && [ -n "$warned" ]; then
        echo "saved and put back into the queue: job $SLURM_JOB_ID goes on when its turn comes"
        trap - USR2 TERM
        scontrol requeue "$SLURM_JOB_ID" && sleep 600 # until SLURM ends this script: a status of its own might count
    fi
}

finish() { # SCRIPT: end with $status, and say what a failure means for the jobs that wait
    if [ -n "${SLURM_JOB_ID:-}" ] && [ "$status" != 0 ] && [ "$status" != 75 ]; then
        echo "$1 failed with status $status. Jobs that depend on it are cancelled; mend it and submit again." >&2
    fi
    exit "$status"
}
