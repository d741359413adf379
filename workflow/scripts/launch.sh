#!/bin/sh
# launch.sh NODES PROCESSES MINUTES COMMAND...: runs `m2d COMMAND...`, PROCESSES of it on each node.
# One process: m2d itself. Several on one node: torchrun. Several nodes: one torchrun on each of the
# nodes of this Slurm job, meeting on the first of them.
set -eu
nodes=$1 processes=$2 minutes=$3
shift 3
# A job of a queue has so many minutes. Ten are for the last step, its checkpoint, and the start.
if [ -n "${SLURM_JOB_ID:-}" ] && [ "$minutes" -gt 20 ]; then
    set -- "$@" --stop-after $((minutes - 10))
fi
# torchrun hands these signals on, so that each process saves its checkpoint.
torchrun="torchrun --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGUSR1 --shutdown-timeout 280"
if [ "$nodes" -gt 1 ]; then
    job=$SLURM_JOB_ID
    first=$(scontrol show hostnames "$(squeue --noheader --format=%N --jobs="$job")" | head -n 1)
    # Snakemake runs in a step of the job, on one node, and what Slurm says to that step would hold
    # for the next one too. The new step shares its processors and GPUs with it.
    for name in $(env | sed -n 's/^\(SLURM_[A-Z_0-9]*\)=.*/\1/p'); do
        [ "$name" = SLURM_CONF ] || unset "$name"
    done
    # Jobs may share a node: each takes a port of its own.
    exec srun --jobid "$job" --overlap --nodes "$nodes" --ntasks "$nodes" --ntasks-per-node 1 \
        --gres "gpu:$processes" --kill-on-bad-exit \
        $torchrun --nnodes "$nodes" --nproc-per-node "$processes" --rdzv-id "$job" \
        --rdzv-backend c10d --rdzv-endpoint "$first:$((20000 + job % 20000))" -m m2d.cli "$@"
elif [ "$processes" -gt 1 ]; then
    exec $torchrun --standalone --nproc-per-node "$processes" -m m2d.cli "$@"
else
    exec m2d "$@"
fi
