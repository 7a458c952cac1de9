#!/usr/bin/env bash
# Starts one node's processes with torchrun; run the same command on every node of the job:
#
#   NODES=2 GPUS=8 HEAD=node1 bash torchrun.sh --config FILE.yaml --run.name long
#
# NODES: nodes. GPUS: processes per node, one for each GPU. HEAD: host name of any one of the nodes,
# which the others meet at (PORT). JOB: a name that tells this job from others that meet there.
# All nodes need the same configs, data and run directory: a shared file system. One process that
# fails ends all of its node, and the other nodes notice: their ranks lose contact.
set -euo pipefail

NODES=${NODES:-1} GPUS=${GPUS:-8} HEAD=${HEAD:-localhost} PORT=${PORT:-29400} JOB=${JOB:-lit-sparse}

# Memory that is freed in pieces of one size stays useful for pieces of another.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

# max-restarts 0: a restart is the user's or the scheduler's, with --ckpt_path last.
exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --max-restarts 0 \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "$JOB" \
  --no-python lit-sparse fit "$@" --trainer.num_nodes "$NODES" --trainer.devices "$GPUS"
