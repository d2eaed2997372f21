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
# A network to the classes of ImageNet: all of it learns, or with --freeze-trunk its head alone. A task a GPU.
# On the warning before its time is up the job saves, goes back into the queue, and goes on from there.
#     DATA=imagenet SAVE=imagenet-TC-SAY sbatch [--nodes=2] scripts/imagenet_finetuning.sh [flags of imagenet_finetuning.py]
set -euo pipefail
house=${HOUSE:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}
source "$house/scripts/step.sh"

DATA=${DATA:-imagenet}
SAVE=${SAVE:-imagenet-TC-SAY}
MODEL_PATH=${MODEL_PATH:-TC-SAY.tar} # start weights

train imagenet_finetuning.py "$DATA" --model-path "$MODEL_PATH" --save-dir "$SAVE" "$@"
