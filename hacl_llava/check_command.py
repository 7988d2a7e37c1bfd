"""``hacl-llava check-data``: of data by itself, or of all that a training would be given, before it is started."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import check_data
from .config import HaclError

if TYPE_CHECKING:
    from .run import Run

_OF_A_TRAINING = ("json", "images", "version", "tokenizer", "max_length", "image_aspect_ratio")  # it says these itself


def run(options: check_data.CheckDataOptions) -> int:
    """Run the command.

    Returns:
        0: all is well, 1: some records cannot be used, 2: the training would be refused.

    Raises:
        HaclError: nothing can be looked at; the command line's exit status is 2.
    """
    if options.training is None:
        if options.json is None:
            raise HaclError("there is nothing to look at: give a JSON, or --run and the arguments of a training.")
        return check_data.run(options)
    default = {field.name: field.default for field in dataclasses.fields(options)} | {"json": None}
    if beside := [name for name in _OF_A_TRAINING if getattr(options, name) != default[name]]:
        names = ", ".join("JSON" if n == "json" else f"--{n.replace('_', '-')}" for n in beside)
        raise HaclError(f"{names}: not beside --run, whose own arguments say it; leave it out.")
    return check_data.run(options, *look(options.training))


def look(argv: Sequence[str]) -> "tuple[Run, list[str]]":
    """A `Run` by its command line, and what the checks of `check_run` say of it; nothing is loaded or written.

    Args:
        argv: of scripts/pretrain_hacl.py or finetune_hacl.py, or what follows these.

    Raises:
        HaclError: they are none.
    """
    from .check_run import problems
    from .integration import run_of

    found = run_of(list(argv))
    return found, list(dict.fromkeys(problems(found)))
