#!/usr/bin/env bash
#SBATCH --job-name=paper_report
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --mem=4G
#SBATCH --time=00:10:00
#SBATCH --output=%x_%j.out
# One page with the results of reproduce.sh so far.
#     OUT=reproduction sbatch scripts/paper_report.sh
set -euo pipefail
project=${PROJECT_DIR:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}
source "$project/scripts/step.sh"

SLURM_RESTART_COUNT=0 run scripts/paper_report.py "${OUT:-reproduction}" "$@"
