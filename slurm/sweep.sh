#!/bin/bash
# Submit one training job a seed, as a job array, and a report of all of them for when they are done.
#
#   slurm/sweep.sh SEEDS RUN CONFIG.yaml [CONFIG.yaml ...] [section.key=value ...]
#   slurm/sweep.sh 0-4 runs/dacs configs/scenes/dacs.yaml mfm.enabled=false
#
# SEEDS as sbatch --array takes them: 0-4, 1,3,7, 0-8:2 or 0-9%2 (two at a time). Seed 3 trains in RUN/seed_3.
# MFM_PACK=8 trains eight seeds a job on one node, a process and a GPU each; MFM_AGAINST=runs/other has the report compare
# with another sweep, paired by seed.
# Options of sbatch: as SBATCH_ variables, or in SBATCH_OPTIONS, e.g. SBATCH_OPTIONS="--nodes=2 --time=12:00:00".

set -eu
if [ $# -lt 3 ]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
cd "$(dirname "$0")/.."
seeds=$1 run=$2
shift 2
# shellcheck source=/dev/null
if [ -f slurm/site.env ]; then . slurm/site.env; fi

refuse() {
    echo "SEEDS=$seeds: give numbers and ranges with commas between them, as in 0-4, 1,3,7, 0-8:2 or 0-9%2" >&2
    exit 2
}
list=${seeds%%%*}
at_once=${seeds#"$list"}
range='^([0-9]{1,6})(-([0-9]{1,6})(:0*([1-9][0-9]{0,5}))?)?$'
runs=() # the folder of each seed
IFS=, read -ra parts <<<"$list"
for part in "${parts[@]}"; do
    [[ $part =~ $range ]] || refuse
    # 10#, for 08 is no octal number.
    first=$((10#${BASH_REMATCH[1]})) last=$((10#${BASH_REMATCH[3]:-${BASH_REMATCH[1]}})) every=${BASH_REMATCH[5]:-1}
    [ "$first" -le "$last" ] || refuse
    for ((seed = first; seed <= last; seed += every)); do runs[seed]=$run/seed_$seed; done
done
[[ ${#runs[@]} -gt 0 && $at_once =~ ^(%[1-9][0-9]*)?$ ]] || refuse
list=$(IFS=, && echo "${!runs[*]}")

pack=${MFM_PACK:-1}
if ! [[ $pack =~ ^[1-9][0-9]{0,3}$ ]]; then
    echo "MFM_PACK=$pack: give the number of seeds that share a node" >&2
    exit 2
fi
if [ "$pack" -gt 1 ]; then
    export MFM_PACK
    what=(--array="0-$(((${#runs[@]} - 1) / pack))$at_once")
    what+=(slurm/pack.sh "${!runs[*]}" "$run" "$@")
else
    what=(--array="$list$at_once" slurm/train_mfm.sh "$@" "run.folder=$run")
fi
# shellcheck disable=SC2086  # several options
array=$(sbatch --parsable ${SBATCH_OPTIONS:-} "${what[@]}")
report=$(sbatch --parsable --kill-on-invalid-dep=yes --dependency="afterok:${array%;*}" slurm/report.sh "${runs[@]}")
echo "training: job array $array, $pack a job of ${runs[*]}; then the report: job $report"
