#!/usr/bin/env bash
# All experiments of the paper as a chain of SLURM jobs, and one page with their results:
#     S=saycam/S A=saycam/A Y=saycam/Y LABELED_S=labeled_S TOYBOX=toybox_videos IMAGENET=imagenet \
#         bash scripts/reproduce.sh [--local | --dry-run]
#     bash scripts/reproduce.sh --tiny [--dry-run]
# S, A, Y: folders with the videos of each child. LABELED_S: a folder of images per class. TOYBOX: the videos of Toybox,
# or TOYBOX_FRAMES: its frames. IMAGENET: train/ and val/. Experiments whose data is not given are skipped; the page lists
# them. --local runs the steps on this machine, one after another; --dry-run prints them; --tiny runs all experiments on
# the small synthetic data set of the demo. Re-run the command after a failure or with other flags: a step is skipped if
# it has run with the same flags, on the same inputs. Further variables:
#     OUT=reproduction                    output folder; the page is report.html
#     MODEL=resnext50_32x4d, BASELINES=random:imagenet
#     TC_FLAGS, MOCO_FLAGS, DECODE_FLAGS, HOG_FLAGS, ANALYSIS_FLAGS, IMAGENET_FLAGS     further flags of the scripts
#     SBATCH_FLAGS, SBATCH_FLAGS_NAME     further flags of every sbatch, or of that of step NAME (with _ for -)
set -euo pipefail
project=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
source "$project/scripts/chain.sh"

tiny() {
    local python=${PYTHON:-$project/.venv/bin/python} world=$OUT/world.part child image part class number=0
    if [ "$mode" != --dry-run ] && [ ! -d "$OUT/world" ]; then
        rm -rf "$world"
        "$python" "$project/scripts/make_demo_videos.py" --save-dir "$world" --videos 3
        for child in S A Y; do
            mkdir -p "$world/$child"
            mv "$(find "$world/videos" -name '*.mp4' | sort | head -n 1)" "$world/$child/"
        done
        for image in "$world"/labeled/*/*; do # every fifth image is for validation
            part='train' class=$(basename "$(dirname "$image")")
            [ $((number++ % 5)) != 0 ] || part='val'
            mkdir -p "$world/imagenet/$part/$class"
            cp "$image" "$world/imagenet/$part/$class/"
        done
        mv "$world" "$OUT/world"
    fi
    world=$OUT/world
    S=$world/S
    A=$world/A
    Y=$world/Y
    LABELED_S=$world/labeled
    TOYBOX_FRAMES=$world/labeled
    IMAGENET=$world/imagenet
    MODEL=resnet18
    BASELINES=random
    SEG_LEN=6
    EPOCHS=12
    MOCO_EPOCHS=8
    IMAGENET_EPOCHS=6
    FRACTION=0.1
    LAYERS='1 2 3'
    TC_FLAGS='--image-size 64 --batch-size 32 --lr 1e-3'
    MOCO_FLAGS='--image-size 64 --batch-size 64 --moco-k 256'
    IMAGENET_FLAGS='--image-size 64 --batch-size 32'
    DECODE_FLAGS='--image-size 64 --batch-size 32 --seeds 3'
    HOG_FLAGS='--seeds 3'
    ANALYSIS_FLAGS='--image-size 64'
}

chain_help "$@"
OUT=${OUT:-reproduction}
mode=${1:-}
if [ "$mode" = --tiny ]; then
    mode=${2:---local}
    [ $# -le 2 ] || chain_error "unknown argument $3"
    [ "$mode" = --local ] || [ "$mode" = --dry-run ] || chain_error "--tiny runs on this machine; give only --dry-run with it"
    tiny
else
    [ $# -le 1 ] || chain_error "unknown argument $2"
    for name in S A Y LABELED_S TOYBOX TOYBOX_FRAMES IMAGENET; do
        [ -z "${!name:-}" ] || [ -d "${!name}" ] || chain_error "$name: there is no folder ${!name}"
    done
fi
MODEL=${MODEL:-resnext50_32x4d}
EPOCHS=${EPOCHS:-16}
MOCO_EPOCHS=${MOCO_EPOCHS:-12}
IMAGENET_EPOCHS=${IMAGENET_EPOCHS:-25}
SEG_LEN=${SEG_LEN:-288}
FRACTION=${FRACTION:-0.01}
LAYERS=${LAYERS:-1 2 3}
chain_flags
read -ra moco_flags <<<"--epochs $MOCO_EPOCHS ${MOCO_FLAGS:-}"
moco_epochs=$(chain_epochs "${moco_flags[@]}")
read -ra imagenet_flags <<<"--epochs $IMAGENET_EPOCHS ${IMAGENET_FLAGS:-}"
read -ra layers <<<"$LAYERS"
chain_begin "$OUT" "$mode"

# Frames and networks of each child, and of all three.
models=${BASELINES:-random:imagenet} names=$models trained=() best=''
for child in S A Y SAY; do
    last=$OUT/TC-$child/${MODEL}_epoch_$((tc_epochs - 1)).tar
    if [ "$child" = SAY ]; then
        if [ -z "${S:-}" ] || [ -z "${A:-}" ] || [ -z "${Y:-}" ]; then continue; fi
        frames=$OUT/frames-S:$OUT/frames-A:$OUT/frames-Y needed="frames-S frames-A frames-Y"
    else
        [ -n "${!child:-}" ] || continue
        frames=$OUT/frames-$child needed=frames-$child
        step "frames-$child" "" "$frames/manifest.json" DATA="${!child}" SAVE="$frames" read_saycam --seg-len "$SEG_LEN"
    fi
    step "TC-$child" "$needed" "$last" DATA="$frames" SAVE="$OUT/TC-$child" MODEL="$MODEL" temporal_classification \
        "${tc_flags[@]}"
    models+=:$last names+=:TC-$child trained+=("TC-$child") best=$child best_frames=${frames##*:}
done
if [ -n "${S:-}" ]; then
    for learner in moco_img moco_temp; do
        last=$OUT/$learner-S/${learner}_checkpoint_$(printf %04d $((moco_epochs - 1))).pth.tar
        step "$learner-S" frames-S "$last" DATA="$OUT/frames-S" SAVE="$OUT/$learner-S" MODEL="$MODEL" "$learner" \
            "${moco_flags[@]}"
        models+=:$last names+=:$learner-S trained+=("$learner-S")
    done
fi

# Linear decoding of all models, compared with HOG: decode NAME BEFORE DATA [FLAGS ...]
decode() {
    local name=$1 data=$3
    step "hog-$name" "$2" "$OUT/hog-$name/results.json" DATA="$data" SAVE="$OUT/hog-$name" hog_baseline \
        "${@:4}" "${hog_flags[@]}"
    step "decoding-$name" "$2 hog-$name ${trained[*]}" "$OUT/decoding-$name/results.json" DATA="$data" \
        SAVE="$OUT/decoding-$name" MODELS="$models" NAMES="$names" linear_decoding "${@:4}" \
        --compare "$OUT/hog-$name/results.json" "${decode_flags[@]}"
}
if [ -n "${LABELED_S:-}" ]; then
    decode labeled_S "" "$LABELED_S"
    decode labeled_S-subsampled "" "$LABELED_S" --subsample
    if [ -d "$LABELED_S/car" ] && [ -d "$LABELED_S/road" ]; then
        decode labeled_S-binary "" "$LABELED_S" --binary-tasks
    fi
fi

# The effect of frame rate, episode length and augmentation: vary NAME FRAMES READ_SAYCAM_FLAGS [TC_FLAGS ...]
vary() {
    local last=$OUT/TC-S-$1/${MODEL}_epoch_$((tc_epochs - 1)).tar flags
    read -ra flags <<<"$3"
    step "$2" "" "$OUT/$2/manifest.json" DATA="$S" SAVE="$OUT/$2" read_saycam "${flags[@]}"
    step "TC-S-$1" "$2" "$last" DATA="$OUT/$2" SAVE="$OUT/TC-S-$1" MODEL="$MODEL" temporal_classification \
        "${tc_flags[@]}" "${@:4}"
    variants+=:$last variant_names+=:TC-S-$1 varied+=("TC-S-$1")
}
if [ -n "${S:-}" ] && [ -n "${LABELED_S:-}" ]; then
    variants=$OUT/TC-S/${MODEL}_epoch_$((tc_epochs - 1)).tar variant_names=TC-S varied=(TC-S)
    vary 1-fps frames-S-1-fps "--fps 1 --seg-len $SEG_LEN"
    vary half-length frames-S-half-length "--seg-len $((SEG_LEN / 2))"
    vary no-augmentation frames-S "--seg-len $SEG_LEN" --no-augmentation
    step decoding-variants "${varied[*]}" "$OUT/decoding-variants/results.json" DATA="$LABELED_S" \
        SAVE="$OUT/decoding-variants" MODELS="$variants" NAMES="$variant_names" linear_decoding "${decode_flags[@]}"
fi

toybox=${TOYBOX_FRAMES:-} toybox_step=''
if [ -n "${TOYBOX:-}" ]; then
    toybox=$OUT/frames-toybox toybox_step=frames-toybox
    step frames-toybox "" "$toybox/manifest.json" DATA="$TOYBOX" SAVE="$toybox" read_saycam --fps 1 --class-by name \
        --no-rotate --shift 0 --recursive
fi
[ -z "$toybox" ] || decode toybox "$toybox_step" "$toybox" --split iid exemplar

# Maps, selectivity, top images and films.
if [ -n "$best" ] && [ -n "${LABELED_S:-}" ]; then
    tc=$OUT/TC-$best/${MODEL}_epoch_$((tc_epochs - 1)).tar decoded=$OUT/decoding-labeled_S/TC-${best}_labeledS_5_iid.tar
    for panel in class-only others; do
        step "maps-$panel" decoding-labeled_S "$OUT/maps-$panel/linear_combination_maps_class_1_${panel%-only}.pdf" \
            DATA="$LABELED_S" MODEL_PATH="$decoded" SAVE="$OUT/maps-$panel" linear_combination_maps --class-idx 1 \
            "--$panel" "${analysis_flags[@]}"
    done
    step selectivities "TC-$best" "$OUT/selectivities/variance_explained_${LAYERS// /_}.pdf" DATA="$LABELED_S" \
        MODEL_PATH="$tc" SAVE="$OUT/selectivities" selectivities --pca --layer "${layers[@]}" "${analysis_flags[@]}"
    step top_images "TC-$best" "$OUT/top_images/highly_activating_imgs_most_selective_6.pdf" DATA="$LABELED_S" \
        MODEL_PATH="$tc" SAVE="$OUT/top_images" highly_activating_imgs --most-selective 6 --all "${analysis_flags[@]}"
    step film "TC-$best" "$OUT/films/intphys_feature_animation_1.mp4" DATA="$best_frames" MODEL_PATH="$tc" \
        SAVE="$OUT/films" feature_animation --frames 200 "${analysis_flags[@]}"
    step class_film decoding-labeled_S "$OUT/films/computers_feature_animation_1.mp4" DATA="$best_frames" \
        MODEL_PATH="$decoded" SAVE="$OUT/films" feature_animation_class "${analysis_flags[@]}"
fi

# ImageNet: only the head; and the whole network on 1 % of the images, then only the head.
if [ -n "$best" ] && [ -n "${IMAGENET:-}" ]; then
    tc=$OUT/TC-$best/${MODEL}_epoch_$((tc_epochs - 1)).tar
    imagenet() { # NAME BEFORE START_WEIGHTS FLAGS
        step "$1" "$2" "$OUT/$1/finished" DATA="$IMAGENET" MODEL_PATH="$3" SAVE="$OUT/$1" imagenet_finetuning \
            "${imagenet_flags[@]}" "${@:4}"
    }
    imagenet imagenet-linear "TC-$best" "$tc" --freeze-trunk
    imagenet imagenet-part "TC-$best" "$tc" --frac-retained "$FRACTION"
    imagenet imagenet-part-linear imagenet-part "$OUT/imagenet-part/ft_IN_$(basename "$tc")" --freeze-trunk
fi

pages=()
for name in TC-{S,A,Y,SAY} moco_{img,temp}-S TC-S-{1-fps,half-length,no-augmentation} \
    decoding-{labeled_S,labeled_S-subsampled,labeled_S-binary,variants,toybox} maps-{class-only,others} selectivities \
    top_images imagenet-{linear,part,part-linear} films; do
    pages+=("$OUT/$name")
done
chain_end "${pages[@]}"
