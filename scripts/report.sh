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
project=${PROJECT_DIR:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}
source "$project/scripts/step.sh"

IFS=: read -ra folders <<<"${FOLDERS:-TC-S:decoding}"
run scripts/report.py "${folders[@]}" --out "${OUT:-report.html}" "$@"
