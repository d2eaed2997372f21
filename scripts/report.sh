#!/usr/bin/env bash
#SBATCH --job-name=report
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --mem=4G
#SBATCH --time=00:10:00
#SBATCH --output=%x_%j.out
# One page with the results in FOLDERS so far.
#     FOLDERS=TC:decoding OUT=report.html sbatch scripts/report.sh [flags of report.py]
set -euo pipefail
for project in "${PROJECT_DIR:-}" "$(dirname "$0")/.." "${SLURM_SUBMIT_DIR:-}" ""; do
    [ ! -e "$project/scripts/step.sh" ] || break
done
source "${project:?set PROJECT_DIR to the folder of this project}/scripts/step.sh"

IFS=: read -ra folders <<<"${FOLDERS:-TC-S:decoding}"
run scripts/report.py "${folders[@]}" --out "${OUT:-report.html}" "$@"
