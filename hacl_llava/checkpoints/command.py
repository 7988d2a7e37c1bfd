"""``hacl-llava export``, ``card`` and ``chat``: their options, and what they run."""

import os
from dataclasses import dataclass, field
from functools import partial

from ..common.options import Loader, Parts, argument, option
from ..config import HaclError

_hub = partial(option, group="model card and hub")


@dataclass
class HubOptions:
    """What is said in a model card, and where a folder is pushed."""

    evaluation: str | None = _hub("json file of results for the model card", metavar="FILE")
    push_to_hub: str | None = _hub("push it there, private if it is new", flag="--push_to_hub", metavar="USER/NAME")
    public: bool = _hub("with --push_to_hub: for all to read", False)

    def check(self) -> None:
        """Refuse, before long work, what would stop the card or the push after it."""
        from . import hub

        if self.public and not self.push_to_hub:
            raise HaclError("--public is for --push_to_hub, which it makes readable for all.")
        if self.evaluation:
            hub.read_evaluation(self.evaluation)
        if self.push_to_hub:
            hub.client(self.push_to_hub)

    def push(self, folder: str) -> int:
        """Push a folder where that is asked for; returns 0."""
        from . import hub

        if self.push_to_hub:
            url, private = hub.push(folder, self.push_to_hub, private=not self.public)
            print(f"{url}: pushed, {'private' if private else 'public'}.")
        return 0


@dataclass
class ExportOptions(HubOptions, Parts):
    """a LLaVA checkpoint in Hugging Face's format, or back

    Write a LLaVA checkpoint as Hugging Face's LlavaForConditionalGeneration with its processor (what vLLM serves), or
    such a checkpoint as LLaVA's own; with --base, a LoRA or projector merged into a whole one.
    """

    source: str = argument("folder of a checkpoint, or of a stage-1 run with --base", metavar="SOURCE")
    target: str = argument("folder to write", metavar="TARGET")
    to: str = option("the format to write", required=True, choices=("hf", "llava"))


def export(options: ExportOptions) -> int:
    """Convert or merge a checkpoint, write its card, push it; returns 0, HaclError says what cannot be."""
    from . import hub
    from .convert import export_to_hf, import_from_hf

    options.check()
    source, target, base, tower = options.source, options.target, options.base, options.vision_tower
    if options.to == "hf":
        export_to_hf(source, target, base, tower)
    elif base:
        from .load import merge  # needs LLaVA, which the others do not

        merge(source, target, base, tower)
    else:
        import_from_hf(source, target, tower)
    print(f"{target}: written.")
    hub.write_card(target, options.evaluation, source, base)
    return options.push(target)


@dataclass
class CardOptions(HubOptions):
    """a model card for a checkpoint's folder, and its way to the hub

    Write README.md, the model card, into a checkpoint's folder from what its files say, and push the folder to the
    Hugging Face hub where that is asked for.
    """

    folder: str = argument("stage-1 folder, LoRA, LLaVA checkpoint, or Hugging Face's", metavar="FOLDER")


def card(options: CardOptions) -> int:
    """Write a folder's card and push it; returns 0, HaclError says what cannot be."""
    from . import hub

    options.check()
    folder, written = options.folder, hub.write_card(options.folder, options.evaluation)
    if written is None and (options.evaluation or not options.push_to_hub):
        raise HaclError(f"{folder}/{hub.CARD}: is not one that hacl_llava wrote, so it is kept; rename it first.")
    print(f"{written}: written." if written else f"{folder}/{hub.CARD}: not one that hacl_llava wrote; kept as it is.")
    return options.push(folder)


@dataclass
class ChatOptions(Loader):
    """talk with a checkpoint about an image, in the terminal

    A first look at any LLaVA checkpoint: talk with it about an image, or ask one --question. The answer goes to stdout
    as it comes, everything else to stderr.
    """

    checkpoint: str = argument("folder or hub id of a checkpoint, or of a projector", metavar="CHECKPOINT")
    image: str | None = option("the image to talk about", metavar="FILE")
    question: str | None = option("answer this on stdout and end", metavar="TEXT")
    temperature: float = option("0: no sampling", 0)
    max_new_tokens: int = option("of an answer", 512)
    dtype: str | None = field(default=None, init=False)  # the device's


def chat(options: ChatOptions) -> int:
    """`chat.run`."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported
    from .chat import run

    return run(options)
