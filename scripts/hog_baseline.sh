#!/usr/bin/env bash
#SBATCH --job-name=hog_baseline
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --mem=100G
#SBATCH --time=06:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.out
# HOG features and a linear classifier on them; more cores by sbatch --cpus-per-task.
#     DATA=labeled_S SAVE=hog sbatch scripts/hog_baseline.sh [flags of hog_baseline.py]
set -euo pipefail
house=${HOUSE:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}
source "$house/scripts/step.sh"

DATA=${DATA:-labeled_S}
SAVE=${SAVE:-hog}

run hog_baseline.py "$DATA" --save-dir "$SAVE" "$@"
