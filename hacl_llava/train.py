"""LLaVA's own train(): stage 1 with HACL on unless ``--use_hacl False``, and stage 2 on top of it.

``deepspeed scripts/pretrain_hacl.py ...``, ``python -m hacl_llava.train ...``, or LLaVA's train_mem.py after
``hacl-llava patch``: the same flags, the same function. ``scripts/finetune_hacl.py`` is stage 2.
"""

import argparse
import errno
import sys

from .config import DataError, HaclError, hacl_argument_fields, on_first_rank

EXAMPLE = """\
example (one machine, all its GPUs; scripts/pretrain_7b.sh is the full run):
  deepspeed scripts/pretrain_hacl.py --deepspeed zero_configs/zero2.json \\
      --model_name_or_path lmsys/vicuna-7b-v1.5 --version plain \\
      --data_path captions_with_hallucinations.json --image_folder images \\
      --vision_tower openai/clip-vit-large-patch14-336 --mm_projector_type mlp2x_gelu \\
      --tune_mm_mlp_adapter True --mm_vision_select_layer -2 \\
      --mm_use_im_start_end False --mm_use_im_patch_token False --bf16 True \\
      --output_dir checkpoints/hacl-7b-pretrain --per_device_train_batch_size 32 \\
      --learning_rate 1e-3 --gradient_checkpointing True

killed or stopped, the same command goes on from the last checkpoint-*.
every other flag is LLaVA's or the transformers Trainer's own: --help_all lists them all.
"""
EXAMPLE_2 = """\
example (the full runs: scripts/finetune_7b.sh, the same with MODE=lora or MODE=qlora):
  deepspeed scripts/finetune_hacl.py --deepspeed zero_configs/zero3.json \\
      --model_name_or_path lmsys/vicuna-7b-v1.5 --version v1 \\
      --pretrain_mm_mlp_adapter checkpoints/hacl-7b-pretrain/mm_projector.bin \\
      --data_path llava_v1_5_mix665k.json --image_folder playground/data --image_aspect_ratio pad \\
      --vision_tower openai/clip-vit-large-patch14-336 --mm_projector_type mlp2x_gelu \\
      --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False --bf16 True \\
      --group_by_modality_length True --output_dir checkpoints/llava-v1.5-7b-hacl \\
      --learning_rate 2e-5 --gradient_checkpointing True

killed or stopped, the same command goes on from the last checkpoint-*. HACL is off unless --use_hacl True: the paper's
ablation found that contrast while the LLM is trained costs a lot.
every other flag is LLaVA's or the transformers Trainer's own: --help_all lists them all.
"""
COMMON = {
    "model_name_or_path": "Llama or Vicuna checkpoint: a folder or a name on the hub.",
    "version": "Conversation template; stage 1 takes: plain.",
    "data_path": "Json in LLaVA's format; each record may have 'hallucinated_captions', a string or a list.",
    "image_folder": "Folder that the records' 'image' is relative to.",
    "vision_tower": "CLIP vision checkpoint: a folder or a name on the hub.",
    "mm_projector_type": "linear or mlp2x_gelu (LLaVA-1.5).",
    "tune_mm_mlp_adapter": "True: train the projector alone, which is stage 1.",
    "output_dir": "Gets mm_projector.bin, hacl_head.safetensors, config.json, trainer_state.json.",
    "deepspeed": "DeepSpeed configuration, such as zero_configs/zero2.json.",
}


STAGE_2 = {
    "version": "Conversation template; LLaVA-1.5's stage 2 takes: v1.",
    "data_path": "Json in LLaVA's format: instructions with answers.",
    "pretrain_mm_mlp_adapter": "mm_projector.bin of stage 1.",
    "lora_enable": "True: train low-rank adapters (--lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5).",
    "bits": "4 or 8: keep the frozen LLM quantized (QLoRA; needs bitsandbytes).",
    "output_dir": "Gets the model, or the LoRA with non_lora_trainables.bin; checkpoint-* while it runs.",
}


def _show_help(stage):
    """The flags that matter, first HACL's; the hundreds of others are one flag away."""
    script = "finetune_hacl.py" if stage == 2 else "pretrain_hacl.py"
    parser = argparse.ArgumentParser(
        prog=script,
        usage=f"deepspeed scripts/{script} [--deepspeed CONFIG] [flags]",
        description="Stage 2 of LLaVA on a projector of stage 1: full, LoRA or QLoRA; can be stopped and resumed."
        if stage == 2
        else "Stage-1 pretraining of LLaVA with HACL: trains the projector, writes mm_projector.bin.",
        epilog=EXAMPLE_2 if stage == 2 else EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    hacl = parser.add_argument_group("HACL")
    for name, kind, field in hacl_argument_fields(use_hacl=stage == 1):
        choices = getattr(kind, "__args__", None)
        metavar = "|".join(choices) if choices else "True|False" if kind is bool else kind.__name__.upper()
        default = "none" if field.default == "" else field.default
        hacl.add_argument(f"--{name}", metavar=metavar, help=f"{field.metadata['help']} (default: {default})")
    common = parser.add_argument_group("LLaVA's, those that every run gives")
    flags = {k: v for k, v in COMMON.items() if k != "tune_mm_mlp_adapter"} | STAGE_2 if stage == 2 else COMMON
    for name, text in flags.items():
        common.add_argument(f"--{name}", metavar="...", help=text)
    parser.print_help()


def main(stage: int = 1) -> int:
    """Entry point of stage 1 or 2.

    Returns:
        The exit status: 0; 2 after a mistake in settings or data, which ends with one line; 75 when a signal stopped
        the run and the same command goes on.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        if on_first_rank():
            _show_help(stage)
        return 0
    sys.argv = [sys.argv[0], *("--help" if a == "--help_all" else a for a in sys.argv[1:])]
    try:
        from . import compat  # noqa: F401, I001  (before llava)
        import llava.train.train as llava_train

        from .integration import install
        from .resume import LOCK, SIGNALS, Stopped
    except ImportError as error:
        if on_first_rank():
            print(f"error: {error}", file=sys.stderr)
        return 2
    install(vars(llava_train), use_hacl=stage == 1, stage=stage)
    try:
        llava_train.train()
        SIGNALS.release()
    except Stopped as stop:
        if on_first_rank():
            print(f"\nstopped: {stop}.", file=sys.stderr)
        return stop.code  # with signals still caught: a launcher may send another
    except HaclError as error:
        message = str(error)
        if "Original Traceback" in message:  # from a data worker process, of which only the last line is ours
            message = message.strip().splitlines()[-1].removeprefix(f"{DataError.__module__}.DataError: ")
        print(f"\nerror: {message}", file=sys.stderr)
        SIGNALS.release()
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        print(f"\nerror: {error.filename or 'the output'}: cannot be written ({error.strerror}).", file=sys.stderr)
        SIGNALS.release()
        return 2
    finally:
        LOCK.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
