#!/bin/bash
# Train several seeds of a small run on one node, a process and a GPU each. slurm/sweep.sh submits it (MFM_PACK).
#
#   sbatch slurm/pack.sh "SEED SEED ..." RUN CONFIG.yaml [CONFIG.yaml ...] [section.key=value ...]
#
# In a job array with MFM_PACK=N task K trains the K-th N of the seeds. Preempted or at its time limit, the job saves all
# runs and requeues itself; finished ones are not trained again.
#
#SBATCH --job-name=mfm-pack
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180

set -u
cd "${MFM_REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}" || exit 2
if [ $# -lt 3 ]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
MFM_PREFIX=()
# shellcheck source=/dev/null
if [ -f slurm/site.env ]; then . slurm/site.env; fi
if [ -z "${MFM_PYTHON:-}" ]; then
    MFM_PYTHON=python3
    if [ -x .venv/bin/python ]; then MFM_PYTHON=.venv/bin/python; fi
fi
read -ra seeds <<<"$1"
run=$2
shift 2
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ] && [ -n "${MFM_PACK:-}" ]; then
    seeds=("${seeds[@]:SLURM_ARRAY_TASK_ID * MFM_PACK:MFM_PACK}")
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"${MFM_PREFIX[@]}" "$MFM_PYTHON" -m mfm_dist.cluster.pack --seeds "${seeds[@]}" -- "$run" "$@" &
pack=$!
trap 'kill -USR1 "$pack"' USR1
trap 'kill -TERM "$pack"' TERM
# A trap ends `wait` early.
while kill -0 "$pack" 2>/dev/null; do wait "$pack"; done
wait "$pack"
code=$?
me=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
if [ "$code" -eq 75 ]; then scontrol requeue "${me:-${SLURM_JOB_ID:-0}}"; fi
exit "$code"
