#!/usr/bin/env bash
#SBATCH --job-name=pack_frames
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --mem=16G
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.out
# A folder of images into tars; a tar that is complete is not written again.
#     DATA=frames_S SAVE=packed_S sbatch scripts/pack_frames.sh [flags of pack_frames.py]
set -euo pipefail
for project in "${PROJECT_DIR:-}" "$(dirname "$0")/.." "${SLURM_SUBMIT_DIR:-}" ""; do
    [ ! -e "$project/scripts/step.sh" ] || break
done
source "${project:?set PROJECT_DIR to the folder of this project}/scripts/step.sh"

DATA=${DATA:-frames_S}
SAVE=${SAVE:-packed_S}

SLURM_RESTART_COUNT=0 run scripts/pack_frames.py "$DATA" --save-dir "$SAVE" "$@"
