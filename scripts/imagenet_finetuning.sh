#!/usr/bin/env bash
#SBATCH --job-name=imagenet_finetuning
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
# Fine-tuning on ImageNet, of the head only with --freeze-trunk: one task per GPU, on any number of nodes.
# Before its time limit the job saves, is requeued, and resumes.
#     DATA=imagenet SAVE=imagenet-TC-SAY sbatch [--nodes=2] scripts/imagenet_finetuning.sh [flags of imagenet_finetuning.py]
set -euo pipefail
for project in "${PROJECT_DIR:-}" "$(dirname "$0")/.." "${SLURM_SUBMIT_DIR:-}" ""; do
    [ ! -e "$project/scripts/step.sh" ] || break
done
source "${project:?set PROJECT_DIR to the folder of this project}/scripts/step.sh"

DATA=${DATA:-imagenet}
SAVE=${SAVE:-imagenet-TC-SAY}
MODEL_PATH=${MODEL_PATH:-TC-SAY.tar} # start weights

train imagenet_finetuning.py "$DATA" --model-path "$MODEL_PATH" --save-dir "$SAVE" "$@"
