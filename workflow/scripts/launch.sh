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
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # Jobs may share a node: each takes a port of its own.
    port=$((20000 + SLURM_JOB_ID % 20000))
    # Snakemake runs in a step of the job already; its processors and GPUs are shared with it.
    exec srun --overlap --nodes "$nodes" --ntasks "$nodes" --ntasks-per-node 1 --kill-on-bad-exit \
        $torchrun --nnodes "$nodes" --nproc-per-node "$processes" --rdzv-id "$SLURM_JOB_ID" \
        --rdzv-backend c10d --rdzv-endpoint "$first:$port" -m m2d.cli "$@"
elif [ "$processes" -gt 1 ]; then
    exec $torchrun --standalone --nproc-per-node "$processes" -m m2d.cli "$@"
else
    exec m2d "$@"
fi
