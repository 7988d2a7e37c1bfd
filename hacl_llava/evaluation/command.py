"""``hacl-llava eval``: its arguments, its tasks, and the run over them."""

import argparse
import contextlib
import os
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.files import locked
from ..common.options import Loader, option, whole
from ..config import HaclError

if TYPE_CHECKING:
    from .engine import Judge, Task


def _api(text):
    if not text.startswith("api:") or not text[4:].strip():
        raise argparse.ArgumentTypeError(f"{text!r}: allowed is api: and a model's name, as api:gpt-4o")
    return text


_task = partial(option, group="tasks, one or more")
_remote = partial(option, group="endpoints (keys come from the environment alone)")


@dataclass
class EvalOptions(Loader):
    """hallucination benchmarks: POPE, CHAIR, AMBER, MMHal-Bench

    Ask a checkpoint, or a model behind an OpenAI-compatible endpoint, the questions of hallucination benchmarks, and
    score its answers. A run that was stopped or killed goes on when the same command is given again.
    """

    model: str = option("folder or hub id, or api:NAME behind an endpoint", required=True, metavar="CHECKPOINT")
    images: str = option("the folder that the questions' images lie in", required=True, metavar="DIR")
    output: str = option("folder for answers and results", required=True, metavar="OUT")
    batch_size: int = option("questions at a time", 16, type=whole, metavar="N")
    max_new_tokens: int | None = option("of an answer (default: each task's own)", type=whole, metavar="N")
    limit: int | None = option("only N questions of each task, drawn by --seed", type=whole, metavar="N")
    seed: int = option("of --limit and of the intervals", 0)
    pope: list[str] | None = _task("question files in POPE's format", nargs="+", metavar="FILE")
    chair: list[str] | None = _task("COCO's instances_*.json, and captions_*.json if there", nargs="+", metavar="FILE")
    chair_synonyms: str | None = _task("synonyms of the 80 categories, in place of ours", metavar="FILE")
    amber: str | None = _task("AMBER's data folder", metavar="FOLDER")
    mmhal: str | None = _task("MMHal-Bench's response_template.json, or its folder; needs --judge", metavar="FILE")
    mmhal_rubric: str | None = _task("the judge's prompt, in place of ours", metavar="FILE")
    base_url: str | None = _remote("of vLLM, SGLang or Ollama, say (default: OpenAI's)", metavar="URL")
    key_env: str = _remote("variable with the key", "OPENAI_API_KEY", metavar="NAME")
    judge: str | None = _remote("the model that judges the answers to MMHal-Bench", type=_api, metavar="api:NAME")
    judge_base_url: str | None = _remote("(default: --base-url)", metavar="URL")
    judge_key_env: str | None = _remote("(default: --key-env)", metavar="NAME")
    concurrency: int = _remote("requests in flight at most", 8, type=whole, metavar="N")


# ---- what is asked


def _tasks(options: EvalOptions) -> "list[Task]":
    """Read all question files."""
    from . import amber, chair, mmhal, pope
    from .engine import Task

    found = [benchmark for path in options.pope or () for benchmark in pope.read(path)]
    if options.chair:
        found += chair.read(options.chair, options.chair_synonyms)
    if options.amber:
        found += amber.read(options.amber)
    if options.mmhal:
        found += mmhal.read(options.mmhal)
    if not found:
        raise HaclError("no task: give --pope FILE ..., --chair FILE ..., --amber FOLDER or --mmhal FILE.")
    tasks = [Task(benchmark, options) for benchmark in found]
    for folder, count in Counter(task.folder for task in tasks).items():
        if count > 1:
            raise HaclError(
                f"{folder.name}: two of the question files give a task of this name; rename one, or leave it out."
            )
    return tasks


def _check(options: EvalOptions) -> "Judge | None":
    """Refuse arguments that do not go together; returns the judge, if there is one."""
    model = options.model
    if model.startswith("api:"):
        if not model[4:].strip():
            raise HaclError(f"--model {model}: has no name; give api:NAME, as api:gpt-4o.")
        for name in ("base", "vision_tower", "conv", "bits", "dtype", "device"):
            if getattr(options, name) is not None:
                raise HaclError(f"--{name.replace('_', '-')} is for a checkpoint; {model} is behind an endpoint.")
    for name, other in (("chair_synonyms", "chair"), ("judge", "mmhal"), ("mmhal_rubric", "mmhal")):
        if getattr(options, name) and not getattr(options, other):
            raise HaclError(f"--{name.replace('_', '-')} is for --{other}, which was not given.")
    if options.mmhal and not options.judge:
        raise HaclError("--mmhal needs --judge api:NAME, the model that judges its answers (the paper's is GPT-4).")
    if not os.path.isdir(options.images):
        raise HaclError(f"--images {options.images}: is no folder; give the one that the questions' images lie in.")
    if not options.mmhal:
        return None
    from .engine import Judge
    from .mmhal import read_rubric

    url, key_env = options.judge_base_url or options.base_url, options.judge_key_env or options.key_env
    return Judge(_endpoint(options, options.judge, url, key_env), read_rubric(options.mmhal_rubric))


def _endpoint(options: EvalOptions, model, url, key_env):
    from ..common.endpoint import Endpoint

    return Endpoint(model.removeprefix("api:").strip(), url, key_env, concurrency=options.concurrency)


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

    def __init__(self, options: EvalOptions):
        from ..checkpoints.prompts import check_arguments
        from ..common.weights import local_folder
        from .journal import digest_of

        check_arguments(options)
        self.options, self.name = options, _short_name(options.model)
        self.settings = {
            "model": _place(options.model),
            "digest": digest_of(local_folder(options.model)),
            "base": options.base and _place(options.base),
            "base_digest": options.base and digest_of(local_folder(options.base)),
            "vision_tower": options.vision_tower,
            "bits": options.bits,
        }
        self.settings |= {k: v for k, v in (("template", options.conv), ("dtype", options.dtype)) if v}

    def load(self, answered: bool) -> Any:
        from ..checkpoints.load import load_pretrained
        from ..checkpoints.prompts import default_template
        from .answers import Answerer
        from .engine import say

        options = self.options
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`do_sample` is set to `False`")  # vicuna's generation_config
            loaded = load_pretrained(options.model, options.base, **options.settings())
        template = options.conv or default_template(options.model, options.base, loaded.model.config, loaded.tokenizer)
        self.settings |= {"template": template, "dtype": str(loaded.model.dtype).removeprefix("torch.")}
        answerer = Answerer(loaded, template, options.batch_size)
        say(f"{options.model} on {loaded.model.device}, conversation template {template}.")
        if answerer.plain:
            say(
                "This template asks nothing: every answer is the image's caption. If the language model was trained on "
                "instructions, --conv v1 (or its own) asks them."
            )
        return answerer


class _Api:
    """A model behind an endpoint."""

    def __init__(self, options: EvalOptions):
        self.name, self.endpoint = options.model, _endpoint(options, options.model, options.base_url, options.key_env)
        self.settings = {"model": options.model, "base_url": self.endpoint.url}

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


def run(options: EvalOptions) -> int:
    """Run the command.

    Returns:
        0; questions that failed are counted in the results, and the same command asks them again.

    Raises:
        HaclError: something that was given is not right, which is seen before the model is loaded; or an endpoint gave
            up, or every image fails. Answers so far are kept.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported
    tasks, judge, output = _tasks(options), _check(options), options.output
    with locked(Path(output, ".lock"), output, "choose another --output"), contextlib.ExitStack() as opened:
        try:
            _run(options, tasks, judge, opened)
        except OSError as error:
            raise HaclError(f"{error.filename or output}: {error.strerror}; answers so far are kept.") from None
        except KeyboardInterrupt:
            print(f"\nstopped; answers so far are in {output}. The same command goes on.", file=sys.stderr)
            return 130
    return 0


def _run(options: EvalOptions, tasks, judge, opened):
    from .engine import write_table
    from .journal import check_settings

    source = _Api(options) if options.model.startswith("api:") else _Checkpoint(options)
    for path in Path(options.output).glob("*/settings.json"):
        check_settings(path, source.settings)  # other tasks there are of the same model, too
    for task in tasks:
        opened.enter_context(task.open(source.settings))
    _check_images(tasks, options.images)
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
            write_table(Path(options.output))
