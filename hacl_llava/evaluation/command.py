"""``hacl-llava eval``: its arguments, its tasks, and the run over them."""

import argparse
import contextlib
import os
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.files import locked
from ..common.options import add_loader, whole
from ..config import HaclError

if TYPE_CHECKING:
    from .engine import Judge, Task


def _api(text):
    if not text.startswith("api:") or not text[4:].strip():
        raise argparse.ArgumentTypeError(f"{text!r}: allowed is api: and a model's name, as api:gpt-4o")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give an argparse parser the command's arguments."""
    add = parser.add_argument
    add("--model", required=True, metavar="CHECKPOINT", help="folder or hub id, or api:NAME behind an endpoint")
    add("--images", required=True, metavar="DIR", help="the folder that the questions' images lie in")
    add("--output", required=True, metavar="OUT", help="folder for answers and results")
    add("--batch-size", type=whole, default=16, metavar="N", help="questions at a time (default: 16)")
    add("--max-new-tokens", type=whole, metavar="N", help="of an answer (default: each task's own)")
    add("--limit", type=whole, metavar="N", help="only N questions of each task, drawn by --seed")
    add("--seed", type=int, default=0, help="of --limit and of the intervals (default: 0)")
    add_loader(parser)

    group = parser.add_argument_group("tasks, one or more")
    add = group.add_argument
    add("--pope", nargs="+", metavar="FILE", help="question files in POPE's format")
    add("--chair", nargs="+", metavar="FILE", help="COCO's instances_*.json, and captions_*.json if there")
    add("--chair-synonyms", metavar="FILE", help="synonyms of the 80 categories, in place of those that come along")
    add("--amber", metavar="FOLDER", help="AMBER's data folder")
    add("--mmhal", metavar="FILE", help="MMHal-Bench's response_template.json, or its folder; needs --judge")
    add("--mmhal-rubric", metavar="FILE", help="the judge's prompt, in place of the one that comes along")

    group = parser.add_argument_group("endpoints (keys come from the environment alone)")
    add = group.add_argument
    add("--base-url", metavar="URL", help="of a vLLM, SGLang or Ollama server, say (default: OpenAI's)")
    add("--key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable with the key (default: OPENAI_API_KEY)")
    add("--judge", type=_api, metavar="api:NAME", help="the model that judges the answers to MMHal-Bench")
    add("--judge-base-url", metavar="URL", help="(default: --base-url)")
    add("--judge-key-env", metavar="NAME", help="(default: --key-env)")
    add("--concurrency", type=whole, default=8, metavar="N", help="requests in flight at most (default: 8)")


# ---- what is asked


def _tasks(args) -> "list[Task]":
    """Read all question files."""
    from . import amber, chair, mmhal, pope
    from .engine import Task

    found = [benchmark for path in args.pope or () for benchmark in pope.read(path)]
    if args.chair:
        found += chair.read(args.chair, args.chair_synonyms)
    if args.amber:
        found += amber.read(args.amber)
    if args.mmhal:
        found += mmhal.read(args.mmhal)
    if not found:
        raise HaclError("no task: give --pope FILE ..., --chair FILE ..., --amber FOLDER or --mmhal FILE.")
    tasks = [Task(benchmark, args) for benchmark in found]
    for folder, count in Counter(task.folder for task in tasks).items():
        if count > 1:
            raise HaclError(
                f"{folder.name}: two of the question files give a task of this name; rename one, or leave it out."
            )
    return tasks


def _check(args) -> "Judge | None":
    """Refuse arguments that do not go together; returns the judge, if there is one."""
    if args.model.startswith("api:"):
        if not args.model[4:].strip():
            raise HaclError(f"--model {args.model}: has no name; give api:NAME, as api:gpt-4o.")
        for name in ("base", "vision_tower", "conv", "bits", "dtype", "device"):
            if getattr(args, name) is not None:
                raise HaclError(f"--{name.replace('_', '-')} is for a checkpoint; {args.model} is behind an endpoint.")
    for name, other in (("chair_synonyms", "chair"), ("judge", "mmhal"), ("mmhal_rubric", "mmhal")):
        if getattr(args, name) and not getattr(args, other):
            raise HaclError(f"--{name.replace('_', '-')} is for --{other}, which was not given.")
    if args.mmhal and not args.judge:
        raise HaclError("--mmhal needs --judge api:NAME, the model that judges its answers (the paper's is GPT-4).")
    if not os.path.isdir(args.images):
        raise HaclError(f"--images {args.images}: is no folder; give the one that the questions' images lie in.")
    if not args.mmhal:
        return None
    from .engine import Judge
    from .mmhal import read_rubric

    url, key_env = args.judge_base_url or args.base_url, args.judge_key_env or args.key_env
    return Judge(_endpoint(args, args.judge, url, key_env), read_rubric(args.mmhal_rubric))


def _endpoint(args, model, url, key_env):
    from ..common.endpoint import Endpoint

    return Endpoint(model.removeprefix("api:").strip(), url, key_env, concurrency=args.concurrency)


def _check_images(tasks, folder):
    """Refuse a wrong image folder before minutes of loading."""
    if not any(task.pending() for task in tasks):
        return
    # of all questions: those that are left may be the few whose image is missing, which are no reason to refuse
    paths = {Path(folder, q.image) for task in tasks for q in task.asked}
    missing = sorted(path for path in paths if not os.path.isfile(path))
    if 2 * len(missing) > len(paths):
        raise HaclError(
            f"--images {folder}: {len(missing)} of {len(paths)} images that are asked about are not there; the first: "
            f"{missing[0]}: no such file."
        )


# ---- who is asked


class _Checkpoint:
    """A checkpoint to be loaded when it is known that there is something to ask."""

    def __init__(self, args):
        from ..checkpoints.prompts import check_arguments
        from ..common.weights import local_folder
        from .journal import digest_of

        check_arguments(args)
        self.args, self.name = args, _short_name(args.model)
        self.settings = {
            "model": _place(args.model),
            "digest": digest_of(local_folder(args.model)),
            "base": args.base and _place(args.base),
            "base_digest": args.base and digest_of(local_folder(args.base)),
            "vision_tower": args.vision_tower,
            "bits": args.bits,
        }
        self.settings |= {k: v for k, v in (("template", args.conv), ("dtype", args.dtype)) if v}

    def load(self, answered: bool) -> Any:
        from ..checkpoints.load import load_pretrained
        from ..checkpoints.prompts import default_template
        from .answers import Answerer
        from .engine import say

        args = self.args
        names = ("device", "dtype", "bits", "vision_tower")
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`do_sample` is set to `False`")  # vicuna's generation_config
            loaded = load_pretrained(args.model, args.base, **{name: getattr(args, name) for name in names})
        template = args.conv or default_template(args.model, args.base, loaded.model.config, loaded.tokenizer)
        self.settings |= {"template": template, "dtype": str(loaded.model.dtype).removeprefix("torch.")}
        answerer = Answerer(loaded, template, args.batch_size)
        say(f"{args.model} on {loaded.model.device}, conversation template {template}.")
        if answerer.plain:
            say(
                "This template asks nothing: every answer is the image's caption. If the language model was trained on "
                "instructions, --conv v1 (or its own) asks them."
            )
        return answerer


class _Api:
    """A model behind an endpoint."""

    def __init__(self, args):
        self.name, self.endpoint = args.model, _endpoint(args, args.model, args.base_url, args.key_env)
        self.settings = {"model": args.model, "base_url": self.endpoint.url}

    def load(self, answered: bool) -> Any:
        from .endpoint import EndpointAnswerer

        self.endpoint.known = answered
        return EndpointAnswerer(self.endpoint)


def _place(model):
    return str(Path(model).absolute()) if Path(model).exists() else model


def _short_name(model):
    parts = Path(os.path.abspath(model)).parts
    return "/".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


# ---- the run


def main(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0; questions that failed are counted in the results, and the same command asks them again.

    Raises:
        HaclError: something that was given is not right, which is seen before the model is loaded; or an endpoint gave
            up, or every image fails. Answers so far are kept.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported
    tasks, judge = _tasks(args), _check(args)
    with locked(Path(args.output, ".lock"), args.output, "choose another --output"), contextlib.ExitStack() as opened:
        try:
            _run(args, tasks, judge, opened)
        except OSError as error:
            raise HaclError(f"{error.filename or args.output}: {error.strerror}; answers so far are kept.") from None
        except KeyboardInterrupt:
            print(f"\nstopped; answers so far are in {args.output}. The same command goes on.", file=sys.stderr)
            return 130
    return 0


def _run(args, tasks, judge, opened):
    from .engine import write_table
    from .journal import check_settings

    source = _Api(args) if args.model.startswith("api:") else _Checkpoint(args)
    for path in Path(args.output).glob("*/settings.json"):
        check_settings(path, source.settings)  # other tasks there are of the same model, too
    for task in tasks:
        opened.enter_context(task.open(source.settings))
    _check_images(tasks, args.images)
    model, finished = None, []
    try:
        for task in tasks:
            if task.pending():
                if model is None:
                    model = source.load(any("text" in line for t in tasks for line in t.journal.lines.values()))
                task.ask(model, source.name, source.settings)
            if not task.benchmark.judged:
                finished.append(task.finish(source.name))
        model = None  # its memory, before a judge's hours
        finished += [task.finish(source.name, judge) for task in tasks if task.benchmark.judged]
    finally:  # what ends one task takes nothing from the others
        if finished:
            write_table(Path(args.output))
