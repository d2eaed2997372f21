#!/usr/bin/env bash
# Functions for a chain of steps; pipeline.sh and reproduce.sh source this file with $project set to the project's folder.
#     chain_begin OUT [--local | --dry-run]     start: results go to OUT, logs to OUT/logs, job numbers to OUT/jobs;
#                                               without a flag the steps are submitted to SLURM
#     chain_refuse VARIABLE FLAG ...            stop if the user's VARIABLE has a flag that the chain sets itself
#     chain_epochs FLAG ...                     print the number of epochs that the flags of a trainer ask for
#     chain_flags                               set the arrays tc_flags, decode_flags, hog_flags and analysis_flags from
#                                               EPOCHS, MODEL and the variables of the same names
#     step NAME "BEFORE ..." RESULT [VARIABLE=VALUE ...] SCRIPT [ARGUMENTS]
#                                               run scripts/SCRIPT.sh after the steps BEFORE have succeeded (with
#                                               when=afterany: have ended), unless the file RESULT exists; a RESULT
#                                               manifest.json counts only if it is complete
#     chain_end                                 print where results and logs are
# A step that is still queued from an earlier call is not submitted again. SBATCH_FLAGS are passed to every sbatch, and
# SBATCH_FLAGS_NAME to that of step NAME (with _ for -).
set -euo pipefail
export PROJECT_DIR=${project:?}
declare -A job=() # step -> its SLURM job; none for a step that is done

chain_begin() {
    out=$1 mode=${2:-}
    [ $# -le 2 ] || chain_error "unknown argument $3"
    case $mode in
    "") command -v sbatch >/dev/null || chain_error "there is no sbatch; give --local to run the steps on this machine" ;;
    --local | --dry-run) ;;
    *) chain_error "unknown argument $mode; give --local or --dry-run" ;;
    esac
    [ "$mode" = --dry-run ] || { mkdir -p "$out/logs" && touch "$out/jobs"; }
}

chain_error() {
    echo "$(basename "$0"): error: $1" >&2
    exit 2
}

chain_refuse() {
    local words word flag
    read -ra words <<<"${!1:-}"
    for word in "${words[@]}"; do
        for flag in "${@:2}"; do
            [ "${word%%=*}" != "$flag" ] || chain_error "$1: $flag is set by this script (see MODEL and OUT)"
        done
    done
}

chain_epochs() {
    local words=("$@") epochs='' i
    for ((i = 0; i < $#; i++)); do # of several the last one counts
        case ${words[i]} in
        --epochs=*) epochs=${words[i]#*=} ;;
        --epochs) epochs=${words[i + 1]:-} ;;
        esac
    done
    [[ $epochs =~ ^[1-9][0-9]*$ ]] || chain_error "--epochs $epochs is not a positive integer"
    echo "$epochs"
}

# shellcheck disable=SC2034,SC2153 # the script that sources this file sets and uses them
chain_flags() {
    chain_refuse TC_FLAGS --save-dir --model
    chain_refuse MOCO_FLAGS --save-dir --arch -a
    chain_refuse IMAGENET_FLAGS --save-dir --model-path
    chain_refuse DECODE_FLAGS --save-dir --model-path --names
    chain_refuse HOG_FLAGS --save-dir
    chain_refuse ANALYSIS_FLAGS --save-dir --model-path
    read -ra tc_flags <<<"--epochs $EPOCHS ${TC_FLAGS:-}"
    read -ra decode_flags <<<"--overwrite --model $MODEL ${DECODE_FLAGS:---seeds 5}"
    read -ra hog_flags <<<"--overwrite ${HOG_FLAGS:---seeds 5}"
    read -ra analysis_flags <<<"--overwrite ${ANALYSIS_FLAGS:-}"
    tc_epochs=$(chain_epochs "${tc_flags[@]}")
}

step() {
    local name=$1 result=$3 before variables=()
    read -ra before <<<"$2"
    shift 3
    while [[ $1 == *=* ]]; do
        variables+=("$1")
        shift
    done
    local command=("$project/scripts/$1.sh" "${@:2}")
    if is_done "$result"; then
        echo "$name: already done: $result"
    elif [ "$mode" = --dry-run ]; then
        printf '%s:' "$name${before[*]:+, after ${before[*]}}"
        printf ' %q' "${variables[@]}" bash "${command[@]}"
        printf '\n    result: %s\n' "$result"
    elif [ "$mode" = --local ]; then
        run_here "$name" "$result" "${variables[@]}" bash "${command[@]}"
    else
        submit "$name" "$result"
    fi
}

is_done() {
    [ -e "$1" ] || return 1
    [ "$(basename "$1")" != manifest.json ] || grep -q '"complete": true' "$1"
}

run_here() { # NAME RESULT COMMAND...
    local status=0
    printf '\n== %s (%d s)\n' "$1" "$SECONDS"
    env "${@:3}" || status=$?
    if [ "$status" = 75 ]; then
        echo "$1 was stopped and has saved; re-run the command to resume" >&2
        exit 75
    elif [ "$status" != 0 ]; then
        echo "$(basename "$0"): error: step $1 failed with status $status; the steps after it were not run" >&2
        exit 1
    elif ! is_done "$2"; then
        echo "$(basename "$0"): error: step $1 succeeded without writing $2; check the flags passed to it" >&2
        exit 1
    fi
}

submit() { # NAME RESULT: submit the step with variables, before and command of step()
    local earlier after=() own=SBATCH_FLAGS_${1//-/_} flags each
    earlier=$(sed -n "s/^$1 //p" "$out/jobs" | tail -n 1)
    if [ -n "$earlier" ] && [ -n "$(squeue --noheader --jobs="$earlier" 2>/dev/null)" ]; then
        job[$1]=$earlier
        echo "$1: already queued as job $earlier"
        return
    fi
    for each in "${before[@]}"; do [ -z "${job[$each]:-}" ] || after+=("${job[$each]}"); done
    read -ra flags <<<"${SBATCH_FLAGS:-} ${!own:-}"
    if [ ${#after[@]} -gt 0 ]; then
        flags+=("--dependency=${when:-afterok}:$(IFS=: && echo "${after[*]}")" --kill-on-invalid-dep=yes)
    fi
    job[$1]=$(
        env "${variables[@]}" sbatch --parsable --job-name="$1" --output="$out/logs/%x_%j.out" "${flags[@]}" \
            "${command[@]}"
    )
    job[$1]=${job[$1]%%;*}
    echo "$1 ${job[$1]}" >>"$out/jobs"
    echo "$1: job ${job[$1]}${after[*]:+, after ${after[*]}}; result: $2"
}

chain_end() {
    case $mode in
    --dry-run) ;;
    --local) printf '\nDone after %d s; results: %s\n' "$SECONDS" "$out" ;;
    *) printf '\nLogs: %s. A failed step cancels those after it; fix the error and re-run the command.\n' "$out/logs" ;;
    esac
}
