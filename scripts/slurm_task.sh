#!/bin/bash
# One task of Slurm's becomes one rank: scripts/slurm_task.sh SCRIPT [flags]. For pretrain_7b_slurm.sh.
set -euo pipefail
trap '' USR1 # until the training listens: a signal must not kill it while it loads
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LAUNCHER=python LAUNCHER_ARGS="" PYTHONUNBUFFERED=1
exec "$@" --local_rank "$SLURM_LOCALID" # as DeepSpeed's launcher: LLaVA asks for it, too, to know who saves
