# shellcheck shell=bash
# Sourced with GPUS set: sets SCRIPT (what to run) and PER_DEVICE, so that LLaVA-1.5's global batch is kept.
SCRIPT=${SCRIPT:-pretrain_7b.sh}
case $SCRIPT in
pretrain_7b.sh) BATCH=${BATCH:-256} ;;
finetune_7b.sh) BATCH=${BATCH:-128} ;;
*) echo "error: SCRIPT is $SCRIPT, allowed are pretrain_7b.sh, finetune_7b.sh" >&2; exit 2 ;;
esac
PER_DEVICE=$((BATCH / GPUS))
if [ "$PER_DEVICE" -lt 1 ]; then
    echo "error: a global batch of $BATCH is no image for some of $GPUS GPUs; set BATCH (docs/reliability.md)" >&2
    exit 2
fi
[ $((BATCH % GPUS)) -eq 0 ] || echo "note: $BATCH is not a multiple of $GPUS GPUs; the global batch will be smaller" >&2
