#!/bin/bash
# Stage 2 on one machine, from the projector of scripts/pretrain_7b.sh: LLaVA-1.5's own settings.
#   scripts/finetune_7b.sh               the whole LLM, ZeRO-3
#   MODE=offload scripts/finetune_7b.sh  the same with optimizer and parameters in the host's memory
#   MODE=lora scripts/finetune_7b.sh     LoRA (r 128)
#   MODE=qlora scripts/finetune_7b.sh    LoRA on a 4-bit LLM, ZeRO-2; needs bitsandbytes
# Global batch as LLaVA-1.5: 128 (8 GPUs x 16). With fewer GPUs raise --gradient_accumulation_steps.
# Killed or stopped, the same command goes on from the last checkpoint. More flags may follow.
set -euo pipefail
cd "$(dirname "$0")/.."

DATA=${DATA:-playground/data}
MODE=${MODE:-full}
LORA=(--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --learning_rate 2e-4)
case $MODE in
full) FLAGS=(--deepspeed zero_configs/zero3.json --learning_rate 2e-5) ;;
offload) FLAGS=(--deepspeed zero_configs/zero3_offload.json --learning_rate 2e-5) ;;
lora) FLAGS=(--deepspeed zero_configs/zero3.json "${LORA[@]}") ;;
qlora) FLAGS=(--deepspeed zero_configs/zero2.json --bits 4 "${LORA[@]}") ;; # ZeRO-3 cannot shard 4-bit weights
*) echo "error: MODE is $MODE, allowed are full, offload, lora, qlora" >&2; exit 2 ;;
esac

read -ra COMMAND <<<"${LAUNCHER:-deepspeed} ${LAUNCHER_ARGS:-}" # several words
exec "${COMMAND[@]}" scripts/finetune_hacl.py \
    "${FLAGS[@]}" \
    --model_name_or_path "${LLM:-lmsys/vicuna-7b-v1.5}" \
    --version v1 \
    --data_path "${JSON:-$DATA/llava_v1_5_mix665k.json}" \
    --image_folder "${IMAGES:-$DATA}" \
    --vision_tower "${TOWER:-openai/clip-vit-large-patch14-336}" \
    --pretrain_mm_mlp_adapter "${PROJECTOR:-checkpoints/llava-v1.5-7b-hacl-pretrain/mm_projector.bin}" \
    --mm_projector_type mlp2x_gelu \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --bf16 True \
    --output_dir "${OUTPUT:-checkpoints/llava-v1.5-7b-hacl-$MODE}" \
    --num_train_epochs 1 \
    --per_device_train_batch_size 16 \
    --gradient_accumulation_steps 1 \
    --evaluation_strategy no \
    --save_strategy steps \
    --save_steps 500 \
    --save_total_limit 1 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type cosine \
    --logging_steps 1 \
    --tf32 True \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    --lazy_preprocess True \
    --report_to "${REPORT_TO:-none}" \
    "$@"
