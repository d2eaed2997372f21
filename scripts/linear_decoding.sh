#!/usr/bin/env bash
#SBATCH --job-name=linear_decoding
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:2
#SBATCH --mem=150G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.out
# Linear decoding from frozen networks. In a job array each task decodes one of MODELS into SAVE/NAME.
#     DATA=labeled_S SAVE=decoding sbatch scripts/linear_decoding.sh [flags of linear_decoding.py]
set -euo pipefail
for project in "${PROJECT_DIR:-}" "$(dirname "$0")/.." "${SLURM_SUBMIT_DIR:-}" ""; do
    [ ! -e "$project/scripts/step.sh" ] || break
done
source "${project:?set PROJECT_DIR to the folder of this project}/scripts/step.sh"

DATA=${DATA:-labeled_S}
SAVE=${SAVE:-decoding}
MODELS=${MODELS:-random:TC-S/resnext50_32x4d_epoch_15.tar} # checkpoints, 'random' or 'imagenet'
NAMES=${NAMES:-random:TC-S}                                # their names in the results

IFS=: read -ra models <<<"$MODELS"
IFS=: read -ra names <<<"$NAMES"
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    [[ $SLURM_ARRAY_TASK_ID -lt ${#models[@]} && ${#names[@]} = "${#models[@]}" ]] ||
        fail "there is no model or name number $SLURM_ARRAY_TASK_ID, from 0, in MODELS=$MODELS and NAMES=$NAMES"
    models=("${models[SLURM_ARRAY_TASK_ID]}") names=("${names[SLURM_ARRAY_TASK_ID]}")
    SAVE=$SAVE/${names[0]}
fi
run linear_decoding.py "$DATA" --model-path "${models[@]}" --names "${names[@]}" --save-dir "$SAVE" "$@"
