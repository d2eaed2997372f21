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
# How selective the units of some layers are for classes, and how many dimensions they fill.
#     DATA=labeled_S SAVE=selectivities sbatch scripts/selectivities.sh [flags of selectivities.py]
set -euo pipefail
house=${HOUSE:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}
source "$house/scripts/step.sh"

DATA=${DATA:-labeled_S}
SAVE=${SAVE:-selectivities}
MODEL_PATH=${MODEL_PATH:-TC-S.tar}

run selectivities.py "$DATA" --model-path "$MODEL_PATH" --save-dir "$SAVE" "$@"
