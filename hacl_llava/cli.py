"""``hacl-llava``: the tools beside training. Each command imports what it needs when it runs."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from . import __version__
from .common.options import add_loader
from .config import HaclError

KNOWN_TO_WORK = (
    # transformers, accelerate, peft: what CI runs
    ("4.37", "0.34", "0.10"),
    ("4.57", "1.15", "0.21"),
    ("5.23", "1.15", "0.21"),
)


def _env(args):
    """Print versions and devices; exit status 1 if something needed is missing."""
    import platform

    from .common.report import version

    names = ("torch", "transformers", "accelerate", "peft", "deepspeed", "sentencepiece", "protobuf", "einops")
    found = {name: version(name) for name in names}
    rows = [("hacl_llava", __version__), ("python", platform.python_version()), ("platform", platform.platform())]
    rows += [(name, found[name] or "MISSING") for name in names]
    rows.append(("llava", version("llava-torch") or version("llava") or "MISSING"))
    notes, ok = [], all(found.values())
    if found["torch"]:
        import torch

        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        rows.append(("devices", ", ".join(devices) or "cpu only"))
        rows.append(("cuda / bf16", f"{torch.version.cuda} / {torch.cuda.is_bf16_supported() if devices else 'cpu'}"))
    for name, value in rows:
        print(f"{name:14} {value}")
    try:
        from . import compat  # noqa: F401

        notes.append("llava: imports, with the shims that this transformers needs")
    except ImportError as error:
        ok = False
        notes.append(f"llava: {error}")
    stack = tuple(".".join((found[n] or "0").split(".")[:2]) for n in ("transformers", "accelerate", "peft"))
    named = "transformers {}, accelerate {}, peft {}".format(*stack)
    if stack in KNOWN_TO_WORK:
        notes.append(f"{named}: tested together")
    else:
        tested = "; ".join("transformers {}, accelerate {}, peft {}".format(*s) for s in KNOWN_TO_WORK)
        notes.append(f"{named}: not a tested combination (tested are: {tested})")
    if found["torch"] and tuple(int(x) for x in found["torch"].split(".")[:2]) < (2, 1):
        ok = False
        notes.append(f"torch {found['torch']} is older than 2.1; run: pip install 'torch>=2.1'")
    print()
    for note in notes:
        print(f"- {note}")
    return 0 if ok else 1


def _patch(args):
    from .patching import patch

    print(patch(args.path, check=args.check, revert=args.revert))
    return 0


def _export(args):
    from .checkpoints import hub
    from .checkpoints.convert import export_to_hf, import_from_hf

    _check_hub_arguments(args)
    if args.to == "hf":
        export_to_hf(args.source, args.target, args.base, args.vision_tower)
    elif args.base:
        from .checkpoints.load import merge

        merge(args.source, args.target, args.base, args.vision_tower)
    else:
        import_from_hf(args.source, args.target, args.vision_tower)
    print(f"{args.target}: written.")
    hub.write_card(args.target, args.evaluation, args.source, args.base)
    return _push(args, args.target)


def _card(args):
    from .checkpoints import hub

    _check_hub_arguments(args)
    card = hub.write_card(args.folder, args.evaluation)
    if card is None and (args.evaluation or not args.push_to_hub):
        raise HaclError(f"{args.folder}/{hub.CARD}: is not one that hacl_llava wrote, so it is kept; rename it first.")
    print(f"{card}: written." if card else f"{args.folder}/{hub.CARD}: not one that hacl_llava wrote; kept as it is.")
    return _push(args, args.folder)


def _check_hub_arguments(args):
    """Say before long work what would stop the card or the push after it."""
    from .checkpoints import hub

    if args.public and not args.push_to_hub:
        raise HaclError("--public is for --push_to_hub, which it makes readable for all.")
    if args.evaluation:
        hub.read_evaluation(args.evaluation)
    if args.push_to_hub:
        hub.client(args.push_to_hub)


def _push(args, folder):
    from .checkpoints import hub

    if args.push_to_hub:
        url, private = hub.push(folder, args.push_to_hub, private=not args.public)
        print(f"{url}: pushed, {'private' if private else 'public'}.")
    return 0


def _chat(args):
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported
    from .checkpoints.chat import run

    return run(args)


def _demo(args):
    from .demo import run

    return run(args.output, images=args.images, epochs=args.epochs, seed=args.seed, processes=args.processes)


def _patch_arguments(command):
    command.add_argument("path", metavar="PATH", help="a LLaVA checkout, an installed llava folder, or its train.py")
    action = command.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="only say whether it can be applied or is applied")
    action.add_argument("--revert", action="store_true", help="take the two lines out again")


def _hub_arguments(command):
    group = command.add_argument_group("model card and hub")
    group.add_argument("--evaluation", metavar="FILE", help="json file of results for the model card")
    group.add_argument("--push_to_hub", metavar="USER/NAME", help="push the folder there, private if it is new")
    group.add_argument("--public", action="store_true", help="with --push_to_hub: for all to read")


def _export_arguments(command):
    command.add_argument("source", metavar="SOURCE", help="folder of a checkpoint, or of a stage-1 run with --base")
    command.add_argument("target", metavar="TARGET", help="folder to write")
    command.add_argument("--to", choices=("hf", "llava"), required=True, help="the format to write")
    add_loader(command, "base", "vision-tower")
    _hub_arguments(command)


def _card_arguments(command):
    command.add_argument("folder", metavar="FOLDER", help="stage-1 folder, LoRA, LLaVA checkpoint, or Hugging Face's")
    _hub_arguments(command)


def _chat_arguments(command):
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or hub id of a checkpoint, or of a projector")
    command.add_argument("--image", metavar="FILE", help="the image to talk about")
    command.add_argument("--question", metavar="TEXT", help="answer this on stdout and end")
    command.add_argument("--temperature", type=float, default=0, help="0: no sampling (default: %(default)s)")
    command.add_argument("--max-new-tokens", type=int, default=512, help="of an answer (default: %(default)s)")
    add_loader(command, "base", "vision-tower", "conv", "bits", "device")


def _demo_arguments(command):
    command.add_argument("--output", default="runs/demo", help="folder for everything made (default: %(default)s)")
    command.add_argument("--images", type=int, default=6000, help="training images (default: %(default)s)")
    command.add_argument("--epochs", type=int, default=5, help="passes over them (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of scenes, models and training (default: %(default)s)")
    command.add_argument("--processes", type=int, default=1, help="ranks for DeepSpeed (default: %(default)s)")


_OWN = {  # commands of this module: name -> (what gives a parser its arguments, what runs it)
    "env": (lambda command: None, _env),
    "patch": (_patch_arguments, _patch),
    "export": (_export_arguments, _export),
    "card": (_card_arguments, _card),
    "chat": (_chat_arguments, _chat),
    "demo": (_demo_arguments, _demo),
}
_MODULES = {  # modules with `add_arguments` and `main`
    "hallucinate": ".hallucinate.command",
    "check-data": ".check_data",
    "analyze": ".evaluation.analyze",
    "report": ".evaluation.report",
    "eval": ".evaluation.command",
}
_TEXTS = {  # name, in the order of --help -> (in a line, in full)
    "env": ("versions, devices, and whether they are known to work together", None),
    "patch": (
        "teach LLaVA's own train_mem.py the flag --use_hacl",
        "Add two lines to llava/train/train.py, after which LLaVA's own training scripts take --use_hacl and the "
        "--hacl_* flags. Without the flag they do what they did before.",
    ),
    "hallucinate": (
        "add hallucinated captions to LLaVA-format data",
        "Give every caption of a LLaVA-format json hallucinated captions, the hard negatives of HACL: by rules, by a "
        "model behind an OpenAI-compatible endpoint, or by a mix. A run that was stopped or killed goes on when the "
        "same command is given again.",
    ),
    "check-data": (
        "whether a json and its images can be trained on, and what is odd about them",
        "Look at every record and every image of a LLaVA-format json ahead of training: what would end a run, and what "
        "would be trained on in another way than it was meant. Exit status 0: fine, 1: some records cannot be used, 2: "
        "the data cannot be looked at.",
    ),
    "analyze": (
        "representations of checkpoints side by side: pictures and numbers",
        "The paper's Figure 1 and its numbers, for one to four checkpoints: where images, captions and hallucinated "
        "captions lie, the modality gap, retrieval, and how often an image is closer to its true caption.",
    ),
    "report": (
        "one page that puts runs side by side",
        "Training curves, evaluations with intervals and paired tests, figures of analyses, and images with the "
        "answers of both models where they differ, on one page: report.html, and report.json.",
    ),
    "export": (
        "a LLaVA checkpoint in Hugging Face's format, or back",
        "Write a LLaVA checkpoint as Hugging Face's LlavaForConditionalGeneration with its processor (what vLLM "
        "serves), or such a checkpoint as LLaVA's own; with --base, a LoRA or projector merged into a whole one.",
    ),
    "card": (
        "a model card for a checkpoint's folder, and its way to the hub",
        "Write README.md, the model card, into a checkpoint's folder from what its files say, and push the folder to "
        "the Hugging Face hub where that is asked for.",
    ),
    "chat": (
        "talk with a checkpoint about an image, in the terminal",
        "A first look at any LLaVA checkpoint: talk with it about an image, or ask one --question. The answer goes to "
        "stdout as it comes, everything else to stderr.",
    ),
    "eval": (
        "hallucination benchmarks: POPE, CHAIR, AMBER, MMHal-Bench",
        "Ask a checkpoint, or a model behind an OpenAI-compatible endpoint, the questions of hallucination benchmarks, "
        "and score its answers. A run that was stopped or killed goes on when the same command is given again.",
    ),
    "demo": (
        "stage 1 with HACL on a rendered miniature, from nothing, on a CPU",
        "Render images with captions and hallucinated captions, make a tiny LLM and vision tower, train a projector "
        "with HACL through DeepSpeed, and say what it learnt.",
    ),
}


def _parser():
    parser = argparse.ArgumentParser(
        prog="hacl-llava",
        description="HACL for LLaVA: contrast images with captions and hallucinated captions in stage-1 pretraining.",
        epilog="Training itself: deepspeed scripts/pretrain_hacl.py --help, or python -m hacl_llava.train --help.",
    )
    parser.add_argument("--version", action="version", version=f"hacl_llava {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (line, text) in _TEXTS.items():
        command = commands.add_parser(name, help=line, description=text or line)
        if name in _MODULES:
            module = importlib.import_module(_MODULES[name], __package__)
            arguments, run = module.add_arguments, module.main
        else:
            arguments, run = _OWN[name]
        arguments(command)
        command.set_defaults(run=run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a mistake in what was given ends with one line and exit status 2."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("\nstopped.", file=sys.stderr)
        return 130
    except (HaclError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
