#!/usr/bin/env bash
# All steps from videos and labeled images to a page of accuracies, figures and films, as a chain of SLURM jobs:
#     bash scripts/pipeline.sh VIDEO_DIR LABELED_DIR [--local | --dry-run]
# --local runs the steps on this machine, one after another; --dry-run prints them. Re-run the command after a failure or
# with other flags: a step is skipped if it has run with the same flags, on the same inputs. Variables, with defaults:
#     OUT=pipeline              output folder; the page is report.html
#     MODEL=resnext50_32x4d     architecture
#     EPOCHS=16                 epochs of temporal classification (MoCo: 12)
#     MOCO=                     'yes': also train moco_img and moco_temp
#     READ_FLAGS, TC_FLAGS, MOCO_FLAGS, DECODE_FLAGS, HOG_FLAGS, ANALYSIS_FLAGS     further flags of the scripts
#     SBATCH_FLAGS, SBATCH_FLAGS_NAME     further flags of every sbatch, or of that of step NAME
set -euo pipefail
project=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
source "$project/scripts/chain.sh"

chain_help "$@"
[ $# -ge 2 ] || chain_error "give a folder of videos, and one with a folder of labeled images per class"
for folder in "$1" "$2"; do [ -d "$folder" ] || chain_error "there is no folder $folder"; done
videos=$(CDPATH='' cd -- "$1" && pwd) labeled=$(CDPATH='' cd -- "$2" && pwd)
OUT=${OUT:-pipeline}
MODEL=${MODEL:-resnext50_32x4d}
EPOCHS=${EPOCHS:-16}
chain_refuse READ_FLAGS --save-dir
chain_flags
read -ra read_flags <<<"${READ_FLAGS:-}"
read -ra moco_flags <<<"--epochs 12 ${MOCO_FLAGS:-}"
moco_epochs=$(chain_epochs "${moco_flags[@]}")

chain_begin "$OUT" "${@:3}"
frames=$OUT/frames
tc=$OUT/TC/${MODEL}_epoch_$((tc_epochs - 1)).tar
decoded=$OUT/decoding/TC_labeledS_5_iid.tar
models=random:$tc names=random:TC trained=(TC) pages=()

step frames "" "$frames/manifest.json" DATA="$videos" SAVE="$frames" read_saycam "${read_flags[@]}"
step TC frames "$tc" DATA="$frames" SAVE="$OUT/TC" MODEL="$MODEL" temporal_classification "${tc_flags[@]}"
if [ -n "${MOCO:-}" ]; then
    for learner in moco_img moco_temp; do
        last=$OUT/$learner/${learner}_checkpoint_$(printf %04d $((moco_epochs - 1))).pth.tar
        step "$learner" frames "$last" DATA="$frames" SAVE="$OUT/$learner" MODEL="$MODEL" "$learner" "${moco_flags[@]}"
        models+=:$last names+=:$learner trained+=("$learner")
    done
fi
step hog "" "$OUT/hog/results.json" DATA="$labeled" SAVE="$OUT/hog" hog_baseline "${hog_flags[@]}"
step decoding "${trained[*]} hog" "$OUT/decoding/results.json" DATA="$labeled" SAVE="$OUT/decoding" \
    MODELS="$models" NAMES="$names" linear_decoding --compare "$OUT/hog/results.json" \
    "${decode_flags[@]}"
step maps decoding "$OUT/maps/linear_combination_maps_class_0.pdf" DATA="$labeled" MODEL_PATH="$decoded" \
    SAVE="$OUT/maps" linear_combination_maps --class-idx 0 "${analysis_flags[@]}"
step selectivities TC "$OUT/selectivities/variance_explained_1_2_3.pdf" DATA="$labeled" MODEL_PATH="$tc" \
    SAVE="$OUT/selectivities" selectivities --pca --layer 1 2 3 "${analysis_flags[@]}"
step top_images TC "$OUT/top_images/highly_activating_imgs_most_selective_6.pdf" DATA="$labeled" MODEL_PATH="$tc" \
    SAVE="$OUT/top_images" highly_activating_imgs --most-selective 6 "${analysis_flags[@]}"
step film TC "$OUT/films/intphys_feature_animation_1.mp4" DATA="$frames" MODEL_PATH="$tc" SAVE="$OUT/films" \
    feature_animation "${analysis_flags[@]}"
step class_film decoding "$OUT/films/computers_feature_animation_0.mp4" DATA="$frames" MODEL_PATH="$decoded" \
    SAVE="$OUT/films" feature_animation_class --class-idx 0 "${analysis_flags[@]}"
for name in "${trained[@]}" hog decoding maps selectivities top_images films; do pages+=("$OUT/$name"); done
chain_end "${pages[@]}"
