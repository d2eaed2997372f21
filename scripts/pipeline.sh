#!/usr/bin/env bash
# From videos and labelled images to everything this project shows of a network, as a chain of SLURM jobs:
#     bash scripts/pipeline.sh VIDEO_DIR LABELLED_DIR [--local | --dry-run]
# --local runs the steps here, one by one; --dry-run prints them. What is done already is not done again, so the same
# line goes on after a failure. Variables, with their defaults, say what is done and how:
#     OUT=pipeline              folder of all results
#     MODEL=resnext50_32x4d     architecture
#     EPOCHS=16                 of temporal classification; MoCo's are 12
#     MOCO=                     'yes' trains moco_img and moco_temp as well
#     READ_FLAGS, TC_FLAGS, MOCO_FLAGS, DECODE_FLAGS, HOG_FLAGS, LOOK_FLAGS     more flags for the scripts of a step
#     SBATCH_FLAGS, SBATCH_FLAGS_NAME     more flags for every sbatch, or for that of the step NAME
set -euo pipefail
house=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
source "$house/scripts/chain.sh"

[ $# -ge 2 ] || chain_error "give a folder of videos and one of labelled images, a folder a class"
for folder in "$1" "$2"; do [ -d "$folder" ] || chain_error "there is no folder $folder"; done
videos=$(CDPATH='' cd -- "$1" && pwd) labelled=$(CDPATH='' cd -- "$2" && pwd)
OUT=${OUT:-pipeline} MODEL=${MODEL:-resnext50_32x4d} EPOCHS=${EPOCHS:-16}
read -ra read_flags <<<"${READ_FLAGS:-}"
MOCO_FLAGS=${MOCO_FLAGS:-}
read -ra moco_flags <<<"--epochs 12 ${MOCO_FLAGS//--epochs=/--epochs }"
chain_flags

chain_begin "$OUT" "${@:3}"
frames=$OUT/frames tc=$OUT/TC/${MODEL}_epoch_$((EPOCHS - 1)).tar decoded=$OUT/decoding/TC_labeledS_5_iid.tar
models=random:$tc names=random:TC trained=(TC)
moco_epochs=$(printf '%s\n' "${moco_flags[@]}" | grep -A 1 -x -e --epochs | tail -n 1)

step frames "" "$frames/manifest.json" DATA="$videos" SAVE="$frames" read_saycam "${read_flags[@]}"
step TC frames "$tc" DATA="$frames" SAVE="$OUT/TC" MODEL="$MODEL" temporal_classification "${tc_flags[@]}"
if [ -n "${MOCO:-}" ]; then
    for learner in moco_img moco_temp; do
        last=$OUT/$learner/${learner}_checkpoint_$(printf %04d $((moco_epochs - 1))).pth.tar
        step "$learner" frames "$last" DATA="$frames" SAVE="$OUT/$learner" MODEL="$MODEL" "$learner" "${moco_flags[@]}"
        models+=:$last names+=:$learner trained+=("$learner")
    done
fi
step hog "" "$OUT/hog/results.json" DATA="$labelled" SAVE="$OUT/hog" hog_baseline "${hog_flags[@]}"
step decoding "${trained[*]} hog" "$OUT/decoding/results.json" DATA="$labelled" SAVE="$OUT/decoding" \
    MODELS="$models" NAMES="$names" linear_decoding --beside "$OUT/hog/results.json" \
    "${decode_flags[@]}"
step maps decoding "$OUT/maps/linear_combination_maps_class_0.pdf" DATA="$labelled" MODEL_PATH="$decoded" \
    SAVE="$OUT/maps" linear_combination_maps --class-idx 0 "${look_flags[@]}"
step selectivities TC "$OUT/selectivities/variance_explained_1_2_3.pdf" DATA="$labelled" MODEL_PATH="$tc" \
    SAVE="$OUT/selectivities" selectivities --pca --layer 1 2 3 "${look_flags[@]}"
step top_images TC "$OUT/top_images/highly_activating_imgs_most_selective_6.pdf" DATA="$labelled" MODEL_PATH="$tc" \
    SAVE="$OUT/top_images" highly_activating_imgs --most-selective 6 "${look_flags[@]}"
step film TC "$OUT/films/intphys_feature_animation_1.mp4" DATA="$frames" MODEL_PATH="$tc" SAVE="$OUT/films" \
    feature_animation "${look_flags[@]}"
step class_film decoding "$OUT/films/computers_feature_animation_0.mp4" DATA="$frames" MODEL_PATH="$decoded" \
    SAVE="$OUT/films" feature_animation_class --class-idx 0 "${look_flags[@]}"
chain_end
