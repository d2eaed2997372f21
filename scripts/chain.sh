#!/usr/bin/env bash
# Steps that follow one another; sourced by pipeline.sh and reproduce.sh, with $house set to the project's folder.
#     chain_begin OUT [--local | --dry-run]     where results, logs (OUT/logs) and job numbers (OUT/jobs) go; without
#                                               a flag the steps are submitted to SLURM
#     chain_flags                               more flags for the steps as arrays tc_flags, decode_flags, hog_flags and
#                                               look_flags, from EPOCHS, MODEL and the variables of the same names
#     step NAME "BEFORE ..." RESULT [VARIABLE=VALUE ...] SCRIPT [ARGUMENTS]
#                                               run scripts/SCRIPT.sh once the steps BEFORE have succeeded (with
#                                               when=afterany: have ended), unless the file RESULT is there; that of a
#                                               folder of frames, manifest.json, counts once it says 'complete'
#     chain_end                                 say where to look
# A step that waits in the queue from an earlier call is not submitted again. SBATCH_FLAGS go to every sbatch, and
# SBATCH_FLAGS_NAME to that of step NAME (with _ for -).
set -euo pipefail
export HOUSE=${house:?}
declare -A job=() # step -> its number in the queue; none for a step that is done

chain_begin() {
    out=$1 mode=${2:-}
    [ $# -le 2 ] || chain_error "unknown argument $3"
    case $mode in
    "") command -v sbatch >/dev/null || chain_error "there is no sbatch here; give --local to run the steps here" ;;
    --local | --dry-run) ;;
    *) chain_error "unknown argument $mode; give --local or --dry-run" ;;
    esac
    [ "$mode" = --dry-run ] || { mkdir -p "$out/logs" && touch "$out/jobs"; }
}

chain_error() {
    echo "$(basename "$0"): error: $1" >&2
    exit 2
}

# shellcheck disable=SC2034 # they are for who sources this file
chain_flags() {
    read -ra tc_flags <<<"--epochs $EPOCHS ${TC_FLAGS:-}"
    read -ra decode_flags <<<"--overwrite --model $MODEL ${DECODE_FLAGS:---seeds 5}"
    read -ra hog_flags <<<"--overwrite ${HOG_FLAGS:---seeds 5}"
    read -ra look_flags <<<"--overwrite ${LOOK_FLAGS:-}"
}

step() {
    local name=$1 result=$3 before variables=()
    read -ra before <<<"$2"
    shift 3
    while [[ $1 == *=* ]]; do
        variables+=("$1")
        shift
    done
    local command=("$house/scripts/$1.sh" "${@:2}")
    if is_done "$result"; then
        echo "$name: done already: $result"
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
        echo "$1 was stopped and has saved: give the same line again to go on" >&2
        exit 75
    elif [ "$status" != 0 ]; then
        echo "$(basename "$0"): error: the step $1 failed with status $status; what follows it was not begun" >&2
        exit 1
    fi
}

submit() { # NAME RESULT: with the variables before, variables and command of step()
    local earlier after=() own=SBATCH_FLAGS_${1//-/_} flags
    earlier=$(sed -n "s/^$1 //p" "$out/jobs" | tail -n 1)
    if [ -n "$earlier" ] && [ -n "$(squeue --noheader --jobs="$earlier" 2>/dev/null)" ]; then
        job[$1]=$earlier
        echo "$1: in the queue already as job $earlier"
        return
    fi
    local each
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
    --local) printf '\nAll done after %d s; results are in %s\n' "$SECONDS" "$out" ;;
    *) printf '\nLogs: %s. A step that fails cancels those after it; mend it and give the same line again.\n' "$out/logs" ;;
    esac
}
