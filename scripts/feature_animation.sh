#!/usr/bin/env bash
#SBATCH --job-name=feature_animation
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:2
#SBATCH --mem=150G
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.out
# Film of a feature's activation map over the frames of a folder or a video.
#     DATA=frames_S SAVE=films sbatch scripts/feature_animation.sh [flags of feature_animation.py]
set -euo pipefail
for project in "${PROJECT_DIR:-}" "$(dirname "$0")/.." "${SLURM_SUBMIT_DIR:-}" ""; do
    [ ! -e "$project/scripts/step.sh" ] || break
done
source "${project:?set PROJECT_DIR to the folder of this project}/scripts/step.sh"

DATA=${DATA:-frames_S}
SAVE=${SAVE:-films}
MODEL_PATH=${MODEL_PATH:-TC-S.tar}

run feature_animation.py "$DATA" --model-path "$MODEL_PATH" --save-dir "$SAVE" "$@"
