#!/usr/bin/env bash
# One host's ranks of a training, for schedulers that start the same command on every host:
#
#   NNODES=8 NODE_RANK=3 HEAD=host0 RECIPE=avat3r DATA=/data/shards RUN=/shared/runs/avat3r launch/jobs/torchrun.sh
#
# There is no preflight here, and a host that is lost is noticed by the ranks alone (within a minute). Hosts with several
# networks need GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME.
#
# Tested on one host with two ranks; not on several.

set -euo pipefail

: "${DATA:?is not set: the folder of packed shards}"
: "${RUN:?is not set: the folder of the run, on a disk that all hosts share}"

export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning:torch.distributed.c10d_logger}
exec "${TORCHRUN:-.venv/bin/torchrun}" \
    --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "${RANKS:-gpu}" \
    --master-addr "${HEAD:-127.0.0.1}" --master-port "${PORT:-29500}" \
    --shutdown-timeout 150 --module -- launch.cli train "${RECIPE:-avat3r}" --data "$DATA" --run "$RUN" "$@"
