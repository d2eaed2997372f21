#!/usr/bin/env bash
#SBATCH --job-name=highly_activating_imgs
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --gres=gpu:1
#SBATCH --mem=16G
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.out
# Images that activate units of a network most strongly.
#     DATA=labeled_S SAVE=top_images sbatch scripts/highly_activating_imgs.sh [flags of highly_activating_imgs.py]
set -euo pipefail
for project in "${PROJECT_DIR:-}" "$(dirname "$0")/.." "${SLURM_SUBMIT_DIR:-}" ""; do
    [ ! -e "$project/scripts/step.sh" ] || break
done
source "${project:?set PROJECT_DIR to the folder of this project}/scripts/step.sh"

DATA=${DATA:-labeled_S}
SAVE=${SAVE:-top_images}
MODEL_PATH=${MODEL_PATH:-TC-S.tar}

run highly_activating_imgs.py "$DATA" --model-path "$MODEL_PATH" --save-dir "$SAVE" "$@"
