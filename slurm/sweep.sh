#!/bin/bash
# Submit one training job a seed, as a job array, and a report of all of them for when they are done.
#
#   slurm/sweep.sh SEEDS RUN CONFIG [section.key=value ...]
#   slurm/sweep.sh 0-4 runs/dacs configs/scenes/dacs.yaml mfm.enabled=false
#
# SEEDS is what sbatch --array takes: 0-4, 1,3,7 or 0-9%2 (two at a time). Seed 3 trains in RUN/seed_3.
# Options of sbatch: as SBATCH_ variables, or in SBATCH_OPTIONS, e.g. SBATCH_OPTIONS="--nodes=2 --time=12:00:00".

set -eu
if [ $# -lt 3 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
cd "$(dirname "$0")/.."
seeds=$1 run=$2 config=$3
shift 3
# shellcheck source=/dev/null
if [ -f slurm/site.env ]; then . slurm/site.env; fi

# shellcheck disable=SC2086  # several options
array=$(sbatch --parsable --array="$seeds" ${SBATCH_OPTIONS:-} slurm/train_mfm.sh "$config" "$@" "run.folder=$run")
runs=()
for seed in $(scontrol show hostnames "seed_[${seeds%%%*}]"); do runs+=("$run/$seed"); done
report=$(sbatch --parsable --kill-on-invalid-dep=yes --dependency="afterok:${array%;*}" slurm/report.sh "${runs[@]}")
echo "training: job array $array, one job for each of ${runs[*]}; then the report: job $report"
