#!/usr/bin/env bash
#SBATCH --job-name=selectivities
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --gres=gpu:2
#SBATCH --mem=64G
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.out
# Class selectivity of the units of some layers, and with --pca the dimensionality of their features.
#     DATA=labeled_S SAVE=selectivities sbatch scripts/selectivities.sh [flags of selectivities.py]
set -euo pipefail
for project in "${PROJECT_DIR:-}" "$(dirname "$0")/.." "${SLURM_SUBMIT_DIR:-}" ""; do
    [ ! -e "$project/scripts/step.sh" ] || break
done
source "${project:?set PROJECT_DIR to the folder of this project}/scripts/step.sh"

DATA=${DATA:-labeled_S}
SAVE=${SAVE:-selectivities}
MODEL_PATH=${MODEL_PATH:-TC-S.tar}

run selectivities.py "$DATA" --model-path "$MODEL_PATH" --save-dir "$SAVE" "$@"
