"""Commands as dataclasses: a field is a flag or an argument, and argparse's parser is made from the fields."""

import argparse
import textwrap
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from typing import Any, get_args


def option(help: str, default: Any = None, **how: Any) -> Any:
    """A field that is a flag, ``--its-name``; a bool takes no value, an int or float is read as one.

    Args:
        default: is named at the end of ``help``, unless that speaks of a default or there is none.
        how: keywords of argparse's ``add_argument``, and: flag, its name where that is another; group, the title that
            it stands under in ``--help``; either, a name for flags of which one alone may be given.
    """
    if "default" not in help and default is not None and default is not False:
        help += " (default: %(default)s)"
    given = MISSING if how.get("required") else default
    return field(default=given, kw_only=True, metadata={"help": help, "default": default, **how})


def argument(help: str, **how: Any) -> Any:
    """A field that is an argument without a flag, and has to be given; ``how``: as of `option`."""
    return field(metadata={"help": help, **how})


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """Give a parser the fields of a dataclass, except those with ``init=False``, and a usage of what is required."""
    groups, usage = {None: parser}, [parser.prog, "[options]"]
    for of in (f for f in fields(options) if f.init):
        how = dict(of.metadata)
        group, either, flag = (how.pop(key, None) for key in ("group", "either", "flag"))
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        if either and either not in groups:
            groups[either] = groups[group].add_mutually_exclusive_group()
        if of.type is bool:
            how["action"] = "store_true"
        elif number := {int, float} & {of.type, *get_args(of.type)}:
            how.setdefault("type", number.pop())
        name = of.name
        if of.kw_only:
            name, how["dest"] = flag or "--" + name.replace("_", "-"), name
        made = groups[either or group].add_argument(name, **how)
        if made.required or not of.kw_only:
            value = made.metavar or "{" + ",".join(made.choices) + "}"
            value = f"[{value}]" if made.nargs == "?" else value
            usage += [f"{name} {value}" if of.kw_only else value + " ..." * (made.nargs == "+")]
    words = f"usage: {' '.join(usage)}"
    parser.usage = textwrap.fill(words, 80, subsequent_indent=" " * 9, break_on_hyphens=False).removeprefix("usage: ")


def whole(text: str) -> int:
    """An argparse type: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed is a whole number from 1")
    return int(text)


_loaded = partial(option, group="how the checkpoint is loaded")


@dataclass
class Parts:
    """What makes a whole checkpoint of one that is a part."""

    base: str | None = _loaded("the language model of a projector or LoRA", metavar="LLM")
    vision_tower: str | None = _loaded("folder or hub id, in place of config.json's", metavar="PATH")


@dataclass
class Loader(Parts):
    """How a checkpoint is loaded to be asked. A command without one of these has it as a field with ``init=False``."""

    conv: str | None = _loaded("conversation template (default: by the checkpoint)", metavar="NAME")
    bits: int | None = _loaded("load the language model quantized", choices=(4, 8))
    dtype: str | None = _loaded("(default: float16 on a GPU, else float32)", choices=("float16", "bfloat16", "float32"))
    device: str | None = _loaded("cpu, cuda, cuda:1 (default: a GPU where there is one)")

    def settings(self) -> dict[str, Any]:
        """Keywords of `load_pretrained`, but for ``base``."""
        return {name: getattr(self, name) for name in ("device", "dtype", "bits", "vision_tower")}
