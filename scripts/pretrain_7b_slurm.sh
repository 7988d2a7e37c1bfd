#!/bin/bash
# Stage 1 with HACL under Slurm, from this repository's root; stage 2 with SCRIPT=finetune_7b.sh (and MODE, see there).
#
#   sbatch --nodes 2 scripts/pretrain_7b_slurm.sh                     more flags of the training may follow
#   SCRIPT=finetune_7b.sh sbatch --nodes 2 scripts/pretrain_7b_slurm.sh
#
# One task is one GPU. Two minutes before the time limit Slurm sends USR1: the run saves a checkpoint and ends with
# status 75, and this script puts the job back into the queue, where the same command goes on from there. A run that
# ends in any other way is not repeated. Folders must be the same on all nodes.
# A site's own settings (partition, account) are best given to sbatch: sbatch --partition gpu ...
#SBATCH --job-name=hacl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?is started by sbatch: sbatch scripts/pretrain_7b_slurm.sh}" # Slurm runs a copy of this file
[ -x scripts/slurm_task.sh ] || { echo "error: $PWD holds no scripts/slurm_task.sh; sbatch from the root" >&2; exit 2; }

GPUS=$SLURM_NTASKS
# shellcheck source=scripts/global_batch.sh
source scripts/global_batch.sh
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)}
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))} # of its own: two jobs may share a node
export MASTER_ADDR MASTER_PORT

STATUS=0
# Not --kill-on-bad-exit=1: of ranks that end with 75 one after the other, it kills those behind the first. With --wait,
# a rank that dies still ends the job, after its error was printed.
srun --kill-on-bad-exit=0 --wait=30 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    scripts/slurm_task.sh "scripts/$SCRIPT" --per_device_train_batch_size "$PER_DEVICE" "$@" || STATUS=$?
if [ "$STATUS" -eq 75 ]; then
    echo "saved after a signal; back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || echo "error: not requeued; sbatch the same command again to go on" >&2
fi
exit "$STATUS"
