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
# Frames to a network, by temporal classification: a task a GPU, on any number of nodes.
# On the warning before its time is up the job saves, goes back into the queue, and goes on from there.
#     DATA=frames_S SAVE=TC-S sbatch [--nodes=2] scripts/temporal_classification.sh [flags of temporal_classification.py]
set -euo pipefail
house=${HOUSE:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}
source "$house/scripts/step.sh"

DATA=${DATA:-frames_S}
SAVE=${SAVE:-TC-S}
MODEL=${MODEL:-resnext50_32x4d}

train temporal_classification.py "$DATA" --model "$MODEL" --save-dir "$SAVE" "$@"
