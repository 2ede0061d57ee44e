#!/bin/bash
# Pretraining on several machines under Slurm, over as many jobs as it takes:
#   DATA=/shared/shards OUT=/shared/run sbatch examples/slurm_pretrain.sh --preset paper --epochs 100
# What follows the script's name goes to `asit pretrain`. Set the lines below to your cluster; docs/cluster.md explains.
#SBATCH --job-name=asit-pretrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# The batch script alone hears of the job's end, three minutes before it.
#SBATCH --signal=B:USR1@180

set -euo pipefail
: "${DATA:?where the recordings are: DATA=/shared/shards}"
: "${OUT:?the folder of the run, on storage that all machines see: OUT=/shared/run}"
python=${PYTHON:-python}
processes=${PROCESSES:-${SLURM_GPUS_ON_NODE:-4}}   # for each machine
restarts=${RESTARTS:-3}                            # of dead processes, in one job
# srun has not taken this from sbatch by itself since Slurm 22.05: a machine's processes would share one core.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Seconds that torchrun leaves its processes for the checkpoint (30 unless said; older versions of torch know only the 30).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-150}
port=$((20000 + SLURM_JOB_ID % 20000))

asked=
running=
stop() {
    # To every process of the job's steps but not to this script: the run writes a checkpoint and ends.
    asked=$1
    echo "asked to end ($1): the run writes a checkpoint"
    scancel --signal=TERM "$SLURM_JOB_ID"
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM

# bash runs a trap only while it waits, not while a command in the foreground lasts.
finish() {
    local status=0
    wait "$running" || status=$?
    while kill -0 "$running" 2>/dev/null; do
        status=0
        wait "$running" || status=$?
    done
    return "$status"
}

status=0
if [ -n "${LOCAL:-}" ]; then
    # A copy on each machine's own disk; what is there already is not copied again.
    srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 bash -c 'mkdir -p "$2" && cp -Ru "$1/." "$2"' copy "$DATA" "$LOCAL" &
    running=$!
    finish || status=$?
    DATA=$LOCAL
fi

if [ "$status" -eq 0 ] && [ -z "$asked" ]; then
    srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 "$python" -m torch.distributed.run \
        --nnodes "$SLURM_NNODES" --nproc-per-node "$processes" --max-restarts "$restarts" \
        --rdzv-backend c10d --rdzv-endpoint "$first:$port" --rdzv-id "$SLURM_JOB_ID" \
        -m asit pretrain --data "$DATA" --out "$OUT" --auto-resume "$@" &
    running=$!
    finish || status=$?
    [ "$status" -eq 0 ] && exit 0  # at the end of its schedule, even if it was asked to end meanwhile
fi

if [ -n "$asked" ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
