#!/usr/bin/env bash
# Temporal classification in stages by age, each from the network of the stage before, and one readout of all stages:
#     bash scripts/curriculum.sh FRAMES[:FRAMES ...] LABELED_DIR [--local | --dry-run]
# --local runs the steps on this machine, one after another; --dry-run prints them. Re-run the command after a failure or
# with other flags: a step is skipped if it has run with the same flags, on the same inputs. Variables, with defaults:
#     OUT=curriculum                output folder; the page is report.html
#     STAGES="6-12 12-18 18-33"     ages in months, as --ages takes them
#     ORDER=forward                 forward, backward, or shuffled by SEED=0
#     MODEL=resnext50_32x4d         architecture
#     EPOCHS=16                     epochs of each stage
#     TC_FLAGS, DECODE_FLAGS        further flags of the scripts
#     SBATCH_FLAGS, SBATCH_FLAGS_NAME     further flags of every sbatch, or of that of step NAME
set -euo pipefail
project=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
source "$project/scripts/chain.sh"

chain_help "$@"
[ $# -ge 2 ] || chain_error "give a folder of frames, and one with a folder of labeled images per class"
[ -d "$2" ] || chain_error "there is no folder $2"
OUT=${OUT:-curriculum}
MODEL=${MODEL:-resnext50_32x4d}
EPOCHS=${EPOCHS:-16}
read -ra stages <<<"${STAGES:-6-12 12-18 18-33}"
chain_refuse TC_FLAGS --ages --model-path
chain_flags

case ${ORDER:-forward} in
forward) ;;
backward) mapfile -t stages < <(printf '%s\n' "${stages[@]}" | tac) ;;
shuffled) mapfile -t stages < <(printf '%s\n' "${stages[@]}" | shuf --random-source=<(yes "${SEED:-0}")) ;;
*) chain_error "ORDER=$ORDER is none of forward, backward and shuffled" ;;
esac

chain_begin "$OUT" "${@:3}"
models=random names=random previous='' start=() pages=()
for i in "${!stages[@]}"; do
    name=stage_$((i + 1))_${stages[i]}
    last=$OUT/$name/${MODEL}_epoch_$((tc_epochs - 1)).tar
    step "$name" "$previous" "$last" DATA="$1" SAVE="$OUT/$name" MODEL="$MODEL" temporal_classification \
        "--ages=${stages[i]}" "${start[@]}" "${tc_flags[@]}"
    pages+=("$OUT/$name")
    models+=:$last names+=:$name previous=$name start=(--model-path "$last")
done
step decoding "$previous" "$OUT/decoding/results.json" DATA="$2" SAVE="$OUT/decoding" MODELS="$models" NAMES="$names" \
    linear_decoding "${decode_flags[@]}"
chain_end "${pages[@]}" "$OUT/decoding"
