"""Stage-1 pretraining with HACL: LLaVA's own train(), HACL on unless ``--use_hacl False``. Floor 5.

``deepspeed scripts/pretrain_hacl.py ...``, ``python -m hacl_llava.train ...``, or LLaVA's train_mem.py after
``hacl-llava patch``: the same flags, the same function.
"""

import argparse
import sys

from .config import HaclError, hacl_argument_fields, on_first_rank

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


def _show_help():
    """The flags that matter, first HACL's; the hundreds of others are one flag away."""
    parser = argparse.ArgumentParser(
        prog="pretrain_hacl.py",
        usage="deepspeed scripts/pretrain_hacl.py [--deepspeed CONFIG] [flags]",
        description="Stage-1 pretraining of LLaVA with HACL: trains the projector, writes mm_projector.bin.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    hacl = parser.add_argument_group("HACL")
    for name, kind, field in hacl_argument_fields(use_hacl=True):
        choices = getattr(kind, "__args__", None)
        metavar = "|".join(choices) if choices else "True|False" if kind is bool else kind.__name__.upper()
        hacl.add_argument(f"--{name}", metavar=metavar, help=f"{field.metadata['help']} (default: {field.default})")
    common = parser.add_argument_group("LLaVA's, those that every run gives")
    for name, text in COMMON.items():
        common.add_argument(f"--{name}", metavar="...", help=text)
    parser.print_help()


def main():
    """Entry point; a mistake in settings or data ends with one line and exit status 2."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        if on_first_rank():
            _show_help()
        return 0
    sys.argv = [sys.argv[0], *("--help" if a == "--help_all" else a for a in sys.argv[1:])]
    try:
        from . import compat  # noqa: F401, I001  (before llava)
        import llava.train.train as llava_train

        from .integration import install
    except ImportError as error:
        if on_first_rank():
            print(f"error: {error}", file=sys.stderr)
        return 2
    install(vars(llava_train), use_hacl=True)
    try:
        llava_train.train()
    except HaclError as error:
        message = str(error)
        if "Original Traceback" in message:  # from a data worker process, of which only the last line is ours
            message = message.strip().splitlines()[-1].removeprefix("hacl_llava.records.DataError: ")
        print(f"\nerror: {message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
