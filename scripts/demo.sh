#!/usr/bin/env bash
# The main job, end to end and small: videos to frames, temporal classification, a linear readout, maps of one class.
#     bash scripts/demo.sh [--full] [VIDEO_DIR]
# Without a folder of videos it renders a small world of its own, with labelled pictures of toys that no video shows.
# With one, the readout has to tell the videos apart. --full trains MoCo too, on images and over time. All results are
# in demo/; those of an earlier demo are replaced. PICTURES=100000 trains three times as long.
set -euo pipefail
videos='' full=''
if [ "${1:-}" = --full ]; then
    full=yes
    shift
fi
if [ $# -gt 1 ]; then
    echo "demo.sh: error: unknown argument $2; --full comes first, then one folder" >&2
    exit 2
fi
if [ $# -gt 0 ]; then
    [ -d "$1" ] || { echo "demo.sh: error: there is no folder $1; give one that holds videos" >&2; exit 2; }
    videos=$(CDPATH='' cd -- "$1" && pwd)
fi
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

model=resnet18 # learns fastest from so few frames
size=64        # pixels
episode=6      # seconds: a class of temporal classification
pictures=${PICTURES:-34000} # that the network looks at, over all epochs

step() {
    printf '\n== %s (%d s)\n' "$1" "$SECONDS"
}

bash scripts/setup.sh
SECONDS=0
python=$PWD/.venv/bin/python
mkdir -p demo
rm -rf demo/frames demo/TC demo/moco_img demo/moco_temp demo/labelled demo/hog demo/decoding demo/maps demo/results.json

if [ -z "$videos" ]; then
    step "Rendering a world of toys and rooms"
    rm -rf demo/world
    "$python" scripts/make_demo_videos.py --save-dir demo/world --seconds "$episode"
    videos=demo/world/videos
    labelled=demo/world/labelled
    splits=(iid exemplar)
    shown=book
else
    labelled=demo/labelled
    splits=(iid)
    shown=0
fi

step "Videos to frames: 5 a second, in episodes of $episode seconds"
"$python" read_saycam.py "$videos" --save-dir demo/frames --fps 5 --seg-len "$episode"
if [ ${#splits[@]} = 1 ]; then
    "$python" read_saycam.py "$videos" --save-dir "$labelled" --fps 5 --class-by video
    if [ "$(find "$labelled" -mindepth 1 -maxdepth 1 -type d | wc -l)" -lt 2 ]; then
        echo "demo.sh: error: $videos has one video that can be read; the readout tells videos apart: give two" >&2
        exit 2
    fi
fi

frames=$(find demo/frames -name 'img_*.jpeg' | wc -l)
epochs=$((pictures / frames))
epochs=$((epochs < 1 ? 1 : epochs > 60 ? 60 : epochs))
step "Temporal classification: $epochs epochs of $frames frames"
"$python" temporal_classification.py demo/frames --model "$model" --recipe released --image-size "$size" \
    --batch-size 32 --lr 1e-3 --epochs "$epochs" --save-dir demo/TC
checkpoint=demo/TC/${model}_epoch_$((epochs - 1)).tar
find demo/TC -name "${model}_epoch_*.tar" ! -path "$checkpoint" -delete # the others fill 2 GB

models=(random "$checkpoint") names=(random TC)

if [ -n "$full" ]; then
    # An epoch over time has half as many pairs as one of images, so that twice the epochs are as many steps.
    moco=(-a "$model" --image-size "$size" --moco-k 512 --moco-t 0.1 --mlp --aug-plus --cos --lr 0.06)
    step "MoCo on images: $epochs epochs"
    "$python" moco_img.py demo/frames "${moco[@]}" --batch-size 64 --epochs "$epochs" --save-dir demo/moco_img
    step "MoCo over time: $((2 * epochs)) epochs"
    "$python" moco_temp.py demo/frames "${moco[@]}" --batch-size 128 --epochs "$((2 * epochs))" --save-dir demo/moco_temp
    for learner in moco_img moco_temp; do
        last=$(find "demo/$learner" -name "${learner}_checkpoint_*.tar" | sort | tail -n 1)
        find "demo/$learner" -name "${learner}_checkpoint_*.tar" ! -path "$last" -delete
        models+=("$last") names+=("$learner")
    done
fi

step "Linear readout on the frozen network, beside a random one and HOG"
readout=("$labelled" --split "${splits[@]}" --seeds 3)
"$python" hog_baseline.py "${readout[@]}" --save-dir demo/hog
"$python" linear_decoding.py "${readout[@]}" --model "$model" --model-path "${models[@]}" \
    --names "${names[@]}" --image-size "$size" --batch-size 32 --beside demo/hog/results.json --save-dir demo/decoding

step "Where the network sees class $shown"
"$python" linear_combination_maps.py "$labelled" --model-path "demo/decoding/TC_labeledS_5_${splits[-1]}.tar" \
    --class-idx "$shown" --class-only --image-size 128 --save-dir demo/maps

step "Done"
"$python" scripts/demo_table.py demo/decoding/results.json --save-dir demo --overwrite
printf '\nPictures:\n'
find demo -name '*.png'
