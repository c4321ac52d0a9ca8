#!/bin/bash
# Score trained runs and write their report, one page for all of them.
#
#   sbatch slurm/report.sh RUN [RUN ...]
#   sbatch --dependency=afterok:JOB slurm/report.sh RUN        (when the training job is done, however often requeued)
#
#SBATCH --job-name=mfm-report
#SBATCH --nodes=1
#SBATCH --ntasks=1

set -eu
cd "${MFM_REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}"
MFM_PREFIX=()
# shellcheck source=/dev/null
if [ -f slurm/site.env ]; then . slurm/site.env; fi
if [ -z "${MFM_PYTHON:-}" ]; then
    MFM_PYTHON=python3
    if [ -x .venv/bin/python ]; then MFM_PYTHON=.venv/bin/python; fi
fi
for run in "$@"; do
    "${MFM_PREFIX[@]}" "$MFM_PYTHON" -m mfm_dist.evaluate --run "$run"
done
"${MFM_PREFIX[@]}" "$MFM_PYTHON" -m mfm_dist.report "$@"
# Seeds of one sweep, and of another that it is compared with: means and paired differences.
if [[ $1 =~ /seed_[0-9]+$ ]]; then
    "${MFM_PREFIX[@]}" "$MFM_PYTHON" -m mfm_dist.report.seeds ${MFM_AGAINST:+"$MFM_AGAINST"} "${1%/*}"
fi
