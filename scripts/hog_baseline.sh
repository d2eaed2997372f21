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
# HOG baseline: a linear classifier of HOG features. For more cores: sbatch --cpus-per-task=N.
#     DATA=labeled_S SAVE=hog sbatch scripts/hog_baseline.sh [flags of hog_baseline.py]
set -euo pipefail
for project in "${PROJECT_DIR:-}" "$(dirname "$0")/.." "${SLURM_SUBMIT_DIR:-}" ""; do
    [ ! -e "$project/scripts/step.sh" ] || break
done
source "${project:?set PROJECT_DIR to the folder of this project}/scripts/step.sh"

DATA=${DATA:-labeled_S}
SAVE=${SAVE:-hog}

run hog_baseline.py "$DATA" --save-dir "$SAVE" "$@"
