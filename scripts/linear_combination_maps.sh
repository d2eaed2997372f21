#!/usr/bin/env bash
#SBATCH --job-name=linear_combination_maps
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --gres=gpu:1
#SBATCH --mem=16G
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.out
# Class activation maps of a network with a linear classifier.
#     DATA=labeled_S SAVE=maps sbatch scripts/linear_combination_maps.sh [flags of linear_combination_maps.py]
set -euo pipefail
for project in "${PROJECT_DIR:-}" "$(dirname "$0")/.." "${SLURM_SUBMIT_DIR:-}" ""; do
    [ ! -e "$project/scripts/step.sh" ] || break
done
source "${project:?set PROJECT_DIR to the folder of this project}/scripts/step.sh"

DATA=${DATA:-labeled_S}
SAVE=${SAVE:-maps}
MODEL_PATH=${MODEL_PATH:-decoding/TC-S_labeledS_5_iid.tar}

run linear_combination_maps.py "$DATA" --model-path "$MODEL_PATH" --save-dir "$SAVE" "$@"
