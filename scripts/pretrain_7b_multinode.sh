#!/bin/bash
# Stage 1 with HACL on several machines: 16 GPUs as in the paper would be two nodes of eight.
#
#   cat hostfile
#   node1 slots=8
#   node2 slots=8
#   scripts/pretrain_7b_multinode.sh hostfile
#
# DeepSpeed's launcher reaches the others by ssh (pdsh), so each needs this folder, the data and the environment at the
# same paths; variables that they need too go into .deepspeed_env, a line each (NCCL_SOCKET_IFNAME=eth0, say).
# --per_device_train_batch_size keeps LLaVA-1.5's global batch of 256.
set -euo pipefail
HOSTFILE=${1:?usage: scripts/pretrain_7b_multinode.sh HOSTFILE [flags]}
shift
[ -r "$HOSTFILE" ] || { echo "error: hostfile $HOSTFILE cannot be read; a line is: NAME slots=GPUS" >&2; exit 2; }
HOSTFILE=$(realpath "$HOSTFILE")
GPUS=$(sed -n 's/^[^#]*slots=\([0-9]*\).*/\1/p' "$HOSTFILE" | awk '{n += $1} END {print n + 0}')
[ "$GPUS" -gt 0 ] || { echo "error: $HOSTFILE names no GPUs; a line is: NAME slots=GPUS" >&2; exit 2; }
[ $((256 % GPUS)) -eq 0 ] || echo "note: 256 is not a multiple of $GPUS GPUs; the global batch will be smaller" >&2
LAUNCHER_ARGS="--hostfile $HOSTFILE --master_port ${MASTER_PORT:-29500}" \
    exec "$(dirname "$0")/pretrain_7b.sh" --per_device_train_batch_size $((256 / GPUS)) "$@"
