#!/usr/bin/env bash
#SBATCH --job-name=read_saycam
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --mem=16G
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%A_%a.out
# Videos to frames. The tasks of the array share the videos; a video that is complete is not read again.
#     DATA=videos_S SAVE=frames_S sbatch --array=0-15 scripts/read_saycam.sh [flags of read_saycam.py]
set -euo pipefail
for project in "${PROJECT_DIR:-}" "$(dirname "$0")/.." "${SLURM_SUBMIT_DIR:-}" ""; do
    [ ! -e "$project/scripts/step.sh" ] || break
done
source "${project:?set PROJECT_DIR to the folder of this project}/scripts/step.sh"

DATA=${DATA:-videos_S} # one folder, or several as videos_S:videos_A
SAVE=${SAVE:-frames_S}

take_share
IFS=: read -ra folders <<<"$DATA"
SLURM_RESTART_COUNT=0 run read_saycam.py "${folders[@]}" --save-dir "$SAVE" "${shard[@]}" "$@"
