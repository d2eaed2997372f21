#!/usr/bin/env bash
# Functions for a chain of steps; pipeline.sh and reproduce.sh source this file with $project set to the project's folder.
#     chain_help ARGUMENTS                      print the comment at the head of the script if --help is an argument
#     chain_begin OUT [--local | --dry-run]     start: results go to OUT, logs and commands to OUT/logs, job numbers to
#                                               OUT/jobs; without a flag the steps are submitted to SLURM
#     chain_refuse VARIABLE FLAG ...            stop if the user's VARIABLE has a flag that the chain sets itself
#     chain_epochs FLAG ...                     print the number of epochs that the flags of a trainer ask for
#     chain_flags                               set the arrays tc_flags, decode_flags, hog_flags and analysis_flags from
#                                               EPOCHS, MODEL and the variables of the same names
#     step NAME "BEFORE ..." RESULT [VARIABLE=VALUE ...] SCRIPT [ARGUMENTS]
#                                               run scripts/SCRIPT.sh after the steps BEFORE have succeeded (with
#                                               when=afterany: have ended), unless the file RESULT exists, a
#                                               manifest.json complete, this command wrote it, and none of BEFORE runs
#     chain_end FOLDER ...                      make the page of the results in these folders, and print where it is
# Scripts compare the flags of an earlier result themselves: they replace it, resume, or say in which flag it differs.
# A step that is still queued from an earlier call is not submitted again. SBATCH_FLAGS are passed to every sbatch, and
# SBATCH_FLAGS_NAME to that of step NAME (with _ for -).
set -euo pipefail
export PROJECT_DIR=${project:?}
declare -A job=() # step -> its SLURM job, or 'here'; none for a step that is done

chain_help() {
    [[ " $* " == *" --help "* || " $* " == *" -h "* ]] || return 0
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 0
}

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
    read -ra decode_flags <<<"--overwrite --model $MODEL --seeds 5 ${DECODE_FLAGS:-}"
    read -ra hog_flags <<<"--overwrite --seeds 5 ${HOG_FLAGS:-}"
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
    local command=("$project/scripts/$1.sh" "${@:2}") record=$out/logs/$name.command text
    text=$(printf '%q ' "${variables[@]}" bash "scripts/$1.sh" "${@:2}")
    if is_done; then
        echo "$name: already done: $result"
        return
    fi
    variables+=("RECORD=$record" "COMMAND=$text")
    if [ "$mode" = --dry-run ]; then
        printf '%s: %s\n    result: %s\n' "$name${before[*]:+, after ${before[*]}}" "$text" "$result"
    elif [ "$mode" = --local ]; then
        run_here
    else
        submit
        return
    fi
    job[$name]=here
}

# The functions below use the local variables of step().

is_done() {
    has_result && [ "$text" = "$(cat "$record" 2>/dev/null)" ] || return 1
    local each
    for each in "${before[@]}"; do [ -z "${job[$each]:-}" ] || return 1; done
}

has_result() {
    [ -e "$result" ] || return 1
    [ "$(basename "$result")" != manifest.json ] || grep -q '"complete": true' "$result"
}

run_here() {
    local status=0
    printf '\n== %s (%d s)\n' "$name" "$SECONDS"
    env "${variables[@]}" bash "${command[@]}" || status=$?
    if [ "$status" = 75 ]; then
        echo "$name was stopped and has saved; re-run the command to resume" >&2
        exit 75
    elif [ "$status" != 0 ]; then
        echo "$(basename "$0"): error: step $name failed with status $status; the steps after it were not run" >&2
        exit 1
    elif ! has_result; then
        echo "$(basename "$0"): error: step $name succeeded without writing $result; check the flags passed to it" >&2
        exit 1
    fi
}

submit() {
    local earlier after=() own=SBATCH_FLAGS_${name//-/_} flags each
    earlier=$(sed -n "s/^$name //p" "$out/jobs" | tail -n 1)
    if [ -n "$earlier" ] && [ -n "$(squeue --noheader --jobs="${earlier%% *}" 2>/dev/null)" ]; then
        job[$name]=${earlier%% *}
        [ "$earlier" = "${job[$name]} $text" ] ||
            chain_error "$name is queued with other flags; wait for it, or cancel it with: scancel ${job[$name]}"
        echo "$name: already queued as job ${job[$name]}"
        return
    fi
    for each in "${before[@]}"; do [ -z "${job[$each]:-}" ] || after+=("${job[$each]}"); done
    read -ra flags <<<"${SBATCH_FLAGS:-} ${!own:-}"
    if [ ${#after[@]} -gt 0 ]; then
        flags+=("--dependency=${when:-afterok}:$(IFS=: && echo "${after[*]}")" --kill-on-invalid-dep=yes)
    fi
    job[$name]=$(
        env "${variables[@]}" sbatch --parsable --job-name="$name" --output="$out/logs/%x_%j.out" "${flags[@]}" \
            "${command[@]}"
    )
    job[$name]=${job[$name]%%;*}
    echo "$name ${job[$name]} $text" >>"$out/jobs"
    echo "$name: job ${job[$name]}${after[*]:+, after ${after[*]}}; result: $result"
}

chain_end() {
    [ "$mode" = --dry-run ] || rm -f "$out/report.html"
    when=afterany step report "${!job[*]}" "$out/report.html" FOLDERS="$(IFS=: && echo "$*")" OUT="$out/report.html" report
    case $mode in
    --dry-run) ;;
    --local) printf '\nDone after %d s; open %s\n' "$SECONDS" "$out/report.html" ;;
    *)
        printf '\nThe last job writes the page of results, %s; logs: %s.\n' "$out/report.html" "$out/logs"
        echo "A failed step cancels those after it; fix the error and re-run the command."
        ;;
    esac
}
