#!/bin/bash
# Train on a Slurm cluster; preempted, out of time or with a node lost, the job requeues itself and goes on.
#
#   sbatch slurm/train_mfm.sh [CONFIG.yaml ...] [section.key=value ...]      (the quickstart if nothing is said)
#   sbatch --nodes=4 --gpus-per-node=8 --time=24:00:00 slurm/train_mfm.sh configs/scenes/dacs.yaml train.global_batch=64
#
# Of several files later ones win. Submit it from a clone, or from any folder with a copy of slurm/ where mfm_dist is
# installed. What differs between clusters stands in slurm/site.env (a copy of slurm/site.env.example); none of it is
# needed to try. docs/slurm.md tells the rest. It takes bash 4.4 or newer.
#
#SBATCH --job-name=mfm
#SBATCH --requeue
#SBATCH --open-mode=append
# USR1 to this script, seconds before the time limit: enough to finish a step and save. What takes longer is killed, and
# not requeued: then --signal=B:USR1@600 or so.
#SBATCH --signal=B:USR1@180

set -u
cd "${MFM_REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}" || exit 2
usage="sbatch slurm/train_mfm.sh [CONFIG.yaml ...] [section.key=value ...], from a clone, or where python3 has mfm_dist"
if [ -z "${SLURM_JOB_ID:-}" ]; then echo "$usage" >&2; exit 2; fi
# How Slurm's commands call this job. The bare number of an array's last task is that of the whole array.
me=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
me=${me:-$SLURM_JOB_ID}

# ---- signals ------------------------------------------------------------------------------------------------------

signalled= # the end was announced: time limit, preemption
cancelled= # the end is here: scancel, or Slurm requeues the job by itself
step=      # the srun that runs on all nodes, if there is one
asked=     # whether it was asked to stop
trap 'signalled=--signalled; ask_to_stop' USR1
trap 'cancelled=--cancelled' TERM

ask_to_stop() { # once a step, for torchrun takes the second signal for "at once"
    while [ -z "$asked" ] && [ -n "$step" ] && kill -0 "$step" 2>/dev/null; do
        # Slurm signals the processes that there are: not before there is one on every node.
        if [ "$(find "$JOB/started" -type f | wc -l)" -ge "$used" ]; then
            asked=yes
            say "the end was announced: the ranks are asked to save"
            scancel --signal=USR1 "$me"
        else
            sleep 0.2
        fi
    done
}

# ---- what this cluster is like --------------------------------------------------------------------------------------

MFM_PREFIX=()
# shellcheck source=/dev/null
if [ -f slurm/site.env ]; then . slurm/site.env; fi

if [ -z "${MFM_PYTHON:-}" ]; then
    MFM_PYTHON=python3
    if [ -x .venv/bin/python ]; then MFM_PYTHON=$PWD/.venv/bin/python; fi
fi
python=("${MFM_PREFIX[@]}" "$MFM_PYTHON")

# ---- what this start of the job begins with ------------------------------------------------------------------------

prepare() { # [CONFIG.yaml ...] [section.key=value ...]: prints the job's folder
    local of=(--job "$SLURM_JOB_ID")
    if ! "${python[@]}" -c 'import mfm_dist'; then echo "$usage" >&2; return 2; fi
    if [ "$restarts" -gt 0 ]; then of+=(--restart); fi
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then of+=(--array-task "$SLURM_ARRAY_TASK_ID"); fi
    # Before the other settings, so that those win.
    if [ -n "${MFM_SCRATCH:-}" ]; then set -- "data.scratch=$MFM_SCRATCH" "$@"; fi
    "${python[@]}" -m mfm_dist.cluster.job prepare "${of[@]}" "$@"
}

restarts=${SLURM_RESTART_COUNT:-0}
# Where the first start put code and configuration; a restart asks the clone for nothing. With what was submitted, for a
# number that comes again on another cluster.
note=runs/.jobs/${SLURM_CLUSTER_NAME:-slurm}-$SLURM_JOB_ID
submitted=$(printf '%q ' "$@")
noted=()
if [ "$restarts" -gt 0 ] && [ -f "$note" ]; then mapfile -t noted <"$note"; fi
if [ "${noted[1]:-}" = "$submitted" ] && [ -f "${noted[0]}/config.yaml" ]; then
    JOB=${noted[0]}
else
    JOB=$(prepare "$@") || exit
    mkdir -p runs/.jobs && printf '%s\n' "$JOB" "$submitted" >"$note"
fi
export JOB
# From here on the code is the copy: editing the clone does not change a job that waits or trains (Python 3.11, newer).
code=$(realpath "$JOB")/code
export PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1

job() { "${python[@]}" -m mfm_dist.cluster.job "$@"; }
say() { echo "$(date '+%F %T') $*" | tee -a "$JOB/summary.log" >&2; }

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Processes a node: its GPUs; one without.
processes=${MFM_PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
if [ -z "$processes" ]; then
    processes=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') || processes=1
fi
# Neither Slurm nor the node knows of a GPU: the CPU is meant. Where one of them does, the ranks insist on GPUs.
if [ "${SLURM_GPUS_ON_NODE:-0}" = 0 ] && ! compgen -G '/dev/nvidia[0-9]*' >/dev/null; then
    export CUDA_VISIBLE_DEVICES=
fi
stage=zero${MFM_ZERO_STAGE:-2}
launch_file=$code/configs/accelerate/multinode_${stage/zeroddp/ddp}.yaml
deepspeed_file=$code/configs/deepspeed/$stage.json # named relative to the clone in the launch file
launch_with=(--config_file "$launch_file")
if [ -f "$deepspeed_file" ]; then launch_with+=(--deepspeed_config_file "$deepspeed_file"); fi
if [ ! -f "$launch_file" ]; then
    say "MFM_ZERO_STAGE=$MFM_ZERO_STAGE: it must be 1, 2, 3 or ddp"
    exit 2
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# The launcher passes these signals on to its ranks, which save and end, instead of dying of them.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 PET_SHUTDOWN_TIMEOUT=300
if [ -n "${MFM_NETWORK:-}" ]; then export NCCL_SOCKET_IFNAME=$MFM_NETWORK GLOO_SOCKET_IFNAME=$MFM_NETWORK; fi

# ---- one step on every node ---------------------------------------------------------------------------------------

run_on_all_nodes() { # MODULE [COMMAND ...]: accelerate launch once a node, the srun below COMMAND
    step='' asked=''
    rm -rf "$JOB/started" && mkdir -p "$JOB/started"
    export MODULE=$1
    shift
    # Slurm's own address of the first node, and a port that two jobs on a node do not share.
    local address port=$((20000 + (SLURM_JOB_ID * 7 + ++starts) % 10000))
    address=$(scontrol show node "${nodes[0]}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    # When one node has ended, the others get half a minute: rank 0 may still have a last word to write.
    # shellcheck disable=SC2016  # a node's rank is known on that node alone
    "$@" srun --nodes="$used" --ntasks="$used" --ntasks-per-node=1 --nodelist="$(IFS=,; echo "${nodes[*]:0:$used}")" \
        --cpu-bind=none --kill-on-bad-exit=0 --wait=30 --open-mode=append --output="$JOB/node-%n.log" \
        bash -c 'touch "$JOB/started/$SLURM_PROCID" && exec "$@" --machine_rank "$SLURM_PROCID" -m "$MODULE" --config "$JOB/config.yaml"' \
        node "${python[@]}" -m accelerate.commands.accelerate_cli launch \
        "${launch_with[@]}" \
        --num_machines "$used" --num_processes $((used * each)) \
        --main_process_ip "${address:-${nodes[0]}}" --main_process_port "$port" --rdzv_backend static &
    step=$!
    if [ -n "$signalled" ]; then ask_to_stop; fi
    # A trap ends `wait` early; it is over when srun is.
    while kill -0 "$step" 2>/dev/null; do wait "$step"; done
    wait "$step"
}

# ---- nodes --------------------------------------------------------------------------------------------------------

lost_nodes() { # the nodes that do not answer within a minute, separated by commas
    local node
    for node in "${nodes[@]}"; do
        timeout 60 srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" --quiet true >/dev/null 2>&1 || echo "$node" &
    done | paste -sd, -
}

requeue() { # [NODES to stay away from]
    local before
    say "requeued${1:+, without $1}"
    trap '' TERM # Slurm ends this script when it requeues the job, and there is one thing left to do
    if ! scontrol requeue "$me"; then
        say "this cluster refused the requeue; submit the same command again, it goes on from the last checkpoint"
        exit 75
    fi
    if [ -n "${1:-}" ]; then
        before=$(scontrol show job "$me" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p')
        scontrol update JobId="$me" ExcNodeList="$1${before:+,${before/(null)/}}"
    fi
    exit 75
}

# ---- attempts, until it is done or not worth another ----------------------------------------------------------------

starts=$((restarts * 100))
say "job $me, restarted $restarts time(s), on ${nodes[*]}: $JOB"
while true; do
    planned=$(job plan --nodes "${#nodes[@]}" --processes "$processes" "$JOB") || exit
    read -r used each <<<"$planned"
    well=yes
    if [ "${MFM_PREFLIGHT:-1}" != 0 ] && [ -z "$signalled$cancelled" ]; then
        run_on_all_nodes mfm_dist.cluster.preflight timeout 120 # a minute of its own, and one to start
        case $? in
            0) ;;
            124) say "preflight: no answer for 2 minutes. Can the nodes reach one another? MFM_NETWORK names the interface" ;&
            *) well= ;;
        esac
    fi
    if [ -n "$well" ] && [ -z "$signalled$cancelled" ]; then run_on_all_nodes mfm_dist.train; fi
    lost=
    if ! job has_outcome "$JOB"; then lost=$(lost_nodes); fi
    # shellcheck disable=SC2086  # each is one word or none
    action=$(job next_action $signalled $cancelled --lost "$lost" "$JOB")
    code=$?
    case $action in
        again) ;;
        requeue*) read -r _ away <<<"$action" && requeue "$away" ;;
        *) exit "$code" ;;
    esac
done
