"""``hacl-llava``: the tools beside training. Each command imports what is heavy when it runs."""

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import __version__, check_command, demo, patching
from .checkpoints import command as checkpoints
from .common.options import add_options
from .config import HaclError
from .evaluation import analyze, report
from .evaluation import command as evaluation
from .hallucinate import command as hallucinate

# transformers, accelerate, peft: what CI runs
KNOWN_TO_WORK = (("4.37", "0.34", "0.10"), ("4.57", "1.15", "0.21"), ("5.23", "1.15", "0.21"))


@dataclass
class EnvOptions:
    """versions, devices, and whether they are known to work together"""


def env(options: EnvOptions) -> int:
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
    named = "transformers {}, accelerate {}, peft {}".format
    tested = "; ".join(named(*known) for known in KNOWN_TO_WORK)
    verdict = "tested together" if stack in KNOWN_TO_WORK else f"not a tested combination (tested are: {tested})"
    notes.append(f"{named(*stack)}: {verdict}")
    if found["torch"] and tuple(int(x) for x in found["torch"].split(".")[:2]) < (2, 1):
        ok = False
        notes.append(f"torch {found['torch']} is older than 2.1; run: pip install 'torch>=2.1'")
    print("", *(f"- {note}" for note in notes), sep="\n")
    return 0 if ok else 1


# In the order of --help. The parameter ``options`` of each has the dataclass that its flags are made from; the first
# line of that class's docstring is the command in a line, what follows it in full.
COMMANDS: dict[str, Callable[[Any], int]] = {
    "env": env,
    "patch": patching.run,
    "hallucinate": hallucinate.run,
    "check-data": check_command.run,
    "analyze": analyze.run,
    "report": report.run,
    "export": checkpoints.export,
    "card": checkpoints.card,
    "chat": checkpoints.chat,
    "eval": evaluation.run,
    "demo": demo.run,
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands, whose namespaces also have ``run`` and ``options``, the command and its dataclass."""
    parser = argparse.ArgumentParser(
        prog="hacl-llava",
        description="HACL for LLaVA: contrast images with captions and hallucinated captions in stage-1 pretraining.",
        epilog="Training itself: deepspeed scripts/pretrain_hacl.py --help, or python -m hacl_llava.train --help.",
    )
    parser.add_argument("--version", action="version", version=f"hacl_llava {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, run in COMMANDS.items():
        options = inspect.signature(run).parameters["options"].annotation
        line, _, text = inspect.getdoc(options).partition("\n\n")
        command = commands.add_parser(name, help=line, description=text or line)
        add_options(command, options)
        command.set_defaults(run=run, options=options)
    return parser


def parse(argv: Sequence[str] | None = None) -> tuple[Callable[[Any], int], Any]:
    """What a command line (None: this process's) runs, and with which options; SystemExit as argparse has it."""
    values = vars(make_parser().parse_args(argv))
    run, options = values.pop("run"), values.pop("options")
    return run, options(**values)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a mistake in what was given ends with one line and exit status 2."""
    run, options = parse(argv)
    try:
        return run(options)
    except KeyboardInterrupt:
        print("\nstopped.", file=sys.stderr)
        return 130
    except (HaclError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
