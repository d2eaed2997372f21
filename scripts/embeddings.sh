#!/usr/bin/env bash
#SBATCH --job-name=embeddings
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --mem=32G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%A_%a.out
# Embeddings of images. Each task of an array writes those of its share of the images to a folder in SAVE, shard_I_of_N.
#     DATA=stimuli SAVE=embeddings MODELS=TC-S.tar:random sbatch scripts/embeddings.sh [flags of embeddings.py]
set -euo pipefail
for project in "${PROJECT_DIR:-}" "$(dirname "$0")/.." "${SLURM_SUBMIT_DIR:-}" ""; do
    [ ! -e "$project/scripts/step.sh" ] || break
done
source "${project:?set PROJECT_DIR to the folder of this project}/scripts/step.sh"

DATA=${DATA:-frames_S}
SAVE=${SAVE:-embeddings}
MODELS=${MODELS:-TC-S/resnext50_32x4d_epoch_15.tar} # checkpoints, 'random' or 'imagenet'

take_share
IFS=: read -ra models <<<"$MODELS"
SLURM_RESTART_COUNT=0 run scripts/embeddings.py "$DATA" --model-path "${models[@]}" --save-dir "$SAVE" "${shard[@]}" "$@"
