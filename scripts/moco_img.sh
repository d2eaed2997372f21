#!/usr/bin/env bash
#SBATCH --job-name=moco_img
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
# MoCo on two augmentations of each frame: one task per GPU, on any number of nodes.
# Before its time limit the job saves, is requeued, and resumes.
#     DATA=frames_S SAVE=moco_img-S sbatch [--nodes=2] scripts/moco_img.sh [flags of moco_img.py]
set -euo pipefail
for project in "${PROJECT_DIR:-}" "$(dirname "$0")/.." "${SLURM_SUBMIT_DIR:-}" ""; do
    [ ! -e "$project/scripts/step.sh" ] || break
done
source "${project:?set PROJECT_DIR to the folder of this project}/scripts/step.sh"

DATA=${DATA:-frames_S} # one folder, or several as frames_S:frames_A
SAVE=${SAVE:-moco_img-S}
MODEL=${MODEL:-resnext50_32x4d}

IFS=: read -ra folders <<<"$DATA"
train moco_img.py "${folders[@]}" --arch "$MODEL" --lr 0.015 --mlp --moco-t 0.2 --aug-plus --cos --save-dir "$SAVE" "$@"
