"""Command-line options that several commands have."""

import argparse

_LOADER = {
    "base": {"metavar": "LLM", "help": "the language model of a projector or LoRA"},
    "vision-tower": {"metavar": "PATH", "help": "folder or hub id, in place of config.json's"},
    "conv": {"metavar": "NAME", "help": "conversation template (default: by the kind of checkpoint)"},
    "bits": {"type": int, "choices": (4, 8), "help": "load the language model quantized"},
    "dtype": {"choices": ("float16", "bfloat16", "float32"), "help": "(default: float16 on a GPU, else float32)"},
    "device": {"help": "cpu, cuda, cuda:1 (default: a GPU where there is one)"},
}


def whole(text: str) -> int:
    """An argparse type: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed is a whole number from 1")
    return int(text)


def add_loader(parser: argparse.ArgumentParser, *names: str) -> None:
    """Options of how a checkpoint is loaded, in a group of their own.

    Args:
        names: those that the command has, of base, vision-tower, conv, bits, dtype, device; none: all.
    """
    group = parser.add_argument_group("how the checkpoint is loaded")
    for name in names or _LOADER:
        group.add_argument(f"--{name}", **_LOADER[name])
