#!/bin/bash
# Stage 1 with HACL on several machines: 16 GPUs as in the paper would be two nodes of eight. Slurm has a script
# of its own.
#
#   cat hostfile
#   node1 slots=8
#   node2 slots=8
#   scripts/pretrain_7b_multinode.sh hostfile
#
# DeepSpeed's launcher reaches the others by ssh (pdsh), so each needs this folder, the data and the environment at the
# same paths; variables that they need too go into .deepspeed_env, a line each (NCCL_SOCKET_IFNAME=eth0, say).
# Without ssh, start it on every machine yourself, with its line in the hostfile counted from 0:
#
#   NODE_RANK=0 MASTER_ADDR=node1 scripts/pretrain_7b_multinode.sh hostfile      # on node1
#   NODE_RANK=1 MASTER_ADDR=node1 scripts/pretrain_7b_multinode.sh hostfile      # on node2
#
# SCRIPT=finetune_7b.sh is stage 2. The output folder must be one that all machines see.
# --per_device_train_batch_size keeps LLaVA-1.5's global batch (BATCH: 256, in stage 2 128).
set -euo pipefail
HOSTFILE=${1:?usage: scripts/pretrain_7b_multinode.sh HOSTFILE [flags]}
shift
[ -r "$HOSTFILE" ] || { echo "error: hostfile $HOSTFILE cannot be read; a line is: NAME slots=GPUS" >&2; exit 2; }
HOSTFILE=$(realpath "$HOSTFILE")
case $HOSTFILE in *[[:space:]]*) echo "error: $HOSTFILE: give a hostfile without spaces in its path" >&2; exit 2 ;; esac
GPUS=$(sed -n 's/^[^#]*slots=\([0-9]*\).*/\1/p' "$HOSTFILE" | awk '{n += $1} END {print n + 0}')
[ "$GPUS" -gt 0 ] || { echo "error: $HOSTFILE names no GPUs; a line is: NAME slots=GPUS" >&2; exit 2; }

cd "$(dirname "$0")"
# shellcheck source=scripts/global_batch.sh
source ./global_batch.sh
LAUNCHER_ARGS="--hostfile $HOSTFILE --master_port ${MASTER_PORT:-29500}"
if [ -n "${NODE_RANK:-}" ]; then
    : "${MASTER_ADDR:?with NODE_RANK, give MASTER_ADDR: name or address of the first machine}"
    LAUNCHER_ARGS+=" --no_ssh --node_rank $NODE_RANK --master_addr $MASTER_ADDR"
fi
export LAUNCHER_ARGS
exec "./$SCRIPT" --per_device_train_batch_size "$PER_DEVICE" "$@"
