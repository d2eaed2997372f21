#!/usr/bin/env bash
#SBATCH --job-name=temporal_classification
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --gres=gpu:4
#SBATCH --mem=150G
#SBATCH --time=48:00:00
#SBATCH --signal=B:USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.out
# Temporal classification: one task per GPU, on any number of nodes.
# Before its time limit the job saves, is requeued, and resumes.
#     DATA=frames_S SAVE=TC-S sbatch [--nodes=2] scripts/temporal_classification.sh [flags of temporal_classification.py]
set -euo pipefail
for project in "${PROJECT_DIR:-}" "$(dirname "$0")/.." "${SLURM_SUBMIT_DIR:-}" ""; do
    [ ! -e "$project/scripts/step.sh" ] || break
done
source "${project:?set PROJECT_DIR to the folder of this project}/scripts/step.sh"

DATA=${DATA:-frames_S} # one folder, or several as frames_S:frames_A
SAVE=${SAVE:-TC-S}
MODEL=${MODEL:-resnext50_32x4d}

IFS=: read -ra folders <<<"$DATA"
train temporal_classification.py "${folders[@]}" --model "$MODEL" --save-dir "$SAVE" "$@"
