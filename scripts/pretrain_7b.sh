#!/bin/bash
# Stage 1 with HACL on one machine: Vicuna-7B v1.5, CLIP ViT-L/14-336, LLaVA's 558k captions, all GPUs that it has.
# Everything but the queue and --save_steps is LLaVA-1.5's own script; the queue is the paper's (arXiv 2312.06968).
# LLaVA saves every 24,000 steps, which are more than the run has: a run that is killed would begin anew.
# Global batch as LLaVA-1.5: 256 (8 GPUs x 32). With fewer GPUs raise --gradient_accumulation_steps.
# More flags may follow: scripts/pretrain_7b.sh --hacl_preset paper
set -euo pipefail
cd "$(dirname "$0")/.."

DATA=${DATA:-playground/data/LLaVA-Pretrain}
JSON=${JSON:-$DATA/blip_laion_cc_sbu_558k_hallucinated.json} # LLaVA's json with "hallucinated_captions" in each record

read -ra COMMAND <<<"${LAUNCHER:-deepspeed} ${LAUNCHER_ARGS:-}" # several words
exec "${COMMAND[@]}" scripts/pretrain_hacl.py \
    --deepspeed zero_configs/zero2.json \
    --model_name_or_path "${LLM:-lmsys/vicuna-7b-v1.5}" \
    --version plain \
    --data_path "$JSON" \
    --image_folder "$DATA/images" \
    --vision_tower "${TOWER:-openai/clip-vit-large-patch14-336}" \
    --mm_projector_type mlp2x_gelu \
    --tune_mm_mlp_adapter True \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --bf16 True \
    --output_dir "${OUTPUT:-checkpoints/llava-v1.5-7b-hacl-pretrain}" \
    --num_train_epochs 1 \
    --per_device_train_batch_size 32 \
    --gradient_accumulation_steps 1 \
    --evaluation_strategy no \
    --save_strategy steps \
    --save_steps 500 \
    --save_total_limit 1 \
    --learning_rate 1e-3 \
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
