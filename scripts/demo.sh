#!/usr/bin/env bash
# The full pipeline on a small data set: videos to frames, temporal classification, linear decoding, maps and a film.
#     bash scripts/demo.sh [--full] [VIDEO_DIR]
# Without VIDEO_DIR it renders synthetic videos, and labeled images of toys that are in none of the videos. With
# VIDEO_DIR the linear classifiers are trained to distinguish those videos. --full also trains MoCo, on images and over time.
# Results go to demo/ and replace those of an earlier demo. IMAGES=100000 trains three times as long.
set -euo pipefail
videos=''
full=''
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit
elif [ "${1:-}" = --full ]; then
    full=yes
    shift
fi
if [ $# -gt 1 ]; then
    echo "demo.sh: error: unknown argument $2; give --full first, then one folder" >&2
    exit 2
fi
if [ $# -gt 0 ]; then
    [ -d "$1" ] || { echo "demo.sh: error: there is no folder $1; give a folder of videos" >&2; exit 2; }
    videos=$(CDPATH='' cd -- "$1" && pwd)
fi
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

model=resnet18          # learns fastest from so few frames
size=64                 # pixels
episode=6               # seconds: one class of temporal classification
images=${IMAGES:-34000} # training images over all epochs

step() {
    printf '\n== %s (%d s)\n' "$1" "$SECONDS"
}

bash scripts/setup.sh
SECONDS=0
python=$PWD/.venv/bin/python
mkdir -p demo
rm -rf demo/frames demo/TC demo/moco_img demo/moco_temp demo/labeled demo/hog demo/decoding demo/embeddings demo/maps demo/films

if [ -z "$videos" ]; then
    step "Rendering videos of toys in rooms"
    rm -rf demo/world
    "$python" scripts/make_demo_videos.py --save-dir demo/world --seconds "$episode"
    videos=demo/world/videos
    labeled=demo/world/labeled
    splits=(iid exemplar)
    class=book
else
    labeled=demo/labeled
    splits=(iid)
    class=0
fi

step "Videos to frames: 5 per second, in episodes of $episode seconds"
"$python" read_saycam.py "$videos" --save-dir demo/frames --fps 5 --seg-len "$episode"
if [ ${#splits[@]} = 1 ]; then
    "$python" read_saycam.py "$videos" --save-dir "$labeled" --fps 5 --class-by video
    if [ "$(find "$labeled" -mindepth 1 -maxdepth 1 -type d | wc -l)" -lt 2 ]; then
        echo "demo.sh: error: $videos has only one readable video; decoding distinguishes videos and needs two" >&2
        exit 2
    fi
fi

frames=$(find demo/frames -name 'img_*.jpeg' | wc -l)
epochs=$((images / frames))
epochs=$((epochs < 1 ? 1 : epochs > 60 ? 60 : epochs))
step "Temporal classification: $epochs epochs of $frames frames"
"$python" temporal_classification.py demo/frames --model "$model" --recipe released --image-size "$size" \
    --batch-size 32 --lr 1e-3 --epochs "$epochs" --save-dir demo/TC
checkpoint=demo/TC/${model}_epoch_$((epochs - 1)).tar
find demo/TC -name "${model}_epoch_*.tar" ! -path "$checkpoint" -delete # all others take 2 GB

models=(random "$checkpoint")
names=(random TC)

if [ -n "$full" ]; then
    # An epoch of moco_temp has half as many pairs as one of moco_img: twice the epochs are the same number of steps.
    moco=(-a "$model" --image-size "$size" --moco-k 512 --moco-t 0.1 --mlp --aug-plus --cos --lr 0.06)
    step "MoCo on images: $epochs epochs"
    "$python" moco_img.py demo/frames "${moco[@]}" --batch-size 64 --epochs "$epochs" --save-dir demo/moco_img
    step "MoCo over time: $((2 * epochs)) epochs"
    "$python" moco_temp.py demo/frames "${moco[@]}" --batch-size 128 --epochs "$((2 * epochs))" --save-dir demo/moco_temp
    for method in moco_img moco_temp; do
        last=$(find "demo/$method" -name "${method}_checkpoint_*.tar" | sort | tail -n 1)
        find "demo/$method" -name "${method}_checkpoint_*.tar" ! -path "$last" -delete
        models+=("$last")
        names+=("$method")
    done
fi

step "Linear decoding, compared with a random network and HOG"
decoding=("$labeled" --split "${splits[@]}" --seeds 3)
"$python" hog_baseline.py "${decoding[@]}" --save-dir demo/hog
"$python" linear_decoding.py "${decoding[@]}" --model "$model" --model-path "${models[@]}" \
    --names "${names[@]}" --image-size "$size" --batch-size 32 --compare demo/hog/results.json --save-dir demo/decoding

step "Embeddings of the labeled images"
"$python" scripts/embeddings.py "$labeled" --model "$model" --model-path "$checkpoint" --image-size "$size" --tsne \
    --save-dir demo/embeddings

step "Attention maps and a film of class $class"
"$python" linear_combination_maps.py "$labeled" --model-path "demo/decoding/TC_labeledS_5_${splits[-1]}.tar" \
    --class-idx "$class" --class-only --image-size 128 --save-dir demo/maps
"$python" feature_animation_class.py demo/frames --model-path "demo/decoding/TC_labeledS_5_${splits[-1]}.tar" \
    --class-idx "$class" --image-size 128 --frames 100 --side-by-side --save-dir demo/films

step "Done: open demo/report.html"
learned=("${names[@]:1}")
"$python" scripts/report.py "${learned[@]/#/demo/}" demo/{decoding,embeddings,maps,films} --out demo/report.html --overwrite
"$python" - >demo/results.json <<'END' # the accuracies alone: {MODEL: {TASK: {mean, std}}, majority, chance}
import json

results = json.load(open("demo/decoding/results.json"))
summary = {key: results[key] for key in ("majority", "chance")}
for model, by_task in results["models"].items():
    entries = {task: {key: entry[key] for key in ("mean", "std")} for task, entry in by_task.items()}
    summary["hog" if model == "HOG" else model] = entries
print(json.dumps(summary, indent=1))
END
