"""``hacl-llava hallucinate``: its arguments, and what they put together."""

import argparse
import functools
import os
import shlex
import sys

from .. import __version__
from ..common.endpoint import Endpoint
from ..common.options import whole
from ..common.report import pyplot
from ..config import HaclError
from . import KINDS, lexicon
from .api import ApiSource, Asking, dollars, estimate
from .batch import ResultFiles, run_id, write_requests
from .checks import Checker
from .prompts import Prompt, Settings, read_settings
from .report import write_report
from .rules import RulesSource
from .run import EXIT_INCOMPLETE, Run

SOURCES = ("rules", "api")
GONE = {
    "local": "a model of your own is served by vLLM, SGLang or Ollama: --source api --model NAME --base-url "
    "http://localhost:8000/v1"
}


def _weighted(names, least):
    """An argparse type: one of ``names``, alone (weight 1) or as NAME=WEIGHT."""

    def read(text):
        name, equals, weight = text.partition("=")
        if name in GONE:
            raise argparse.ArgumentTypeError(f"{name!r} is no longer there; {GONE[name]}")
        try:
            weight = float(weight) if equals else 1.0
        except ValueError:
            weight = -1
        if name not in names or not least <= weight < float("inf"):
            raise argparse.ArgumentTypeError(
                f"{text!r}: allowed are {', '.join(names)}, each alone or with =WEIGHT, a number "
                + ("from 0" if least == 0 else "above 0")
            )
        return name, weight

    return read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give an argparse parser the command's arguments."""
    add = parser.add_argument
    add("input", metavar="INPUT", help="LLaVA-format json or json lines, .gz or not")
    add("output", metavar="OUTPUT", help="the same with hallucinated captions (.json, .jsonl, .gz by its name)")
    add(
        "--source",
        type=_weighted(SOURCES, 1e-9),
        action="append",
        metavar="NAME[=SHARE]",
        help="rules (no network, no model; the default), api (an OpenAI-compatible endpoint, your own vLLM or Ollama "
        "too); give it again to mix: --source rules=0.3 --source api=0.7",
    )
    add("--per-caption", type=whole, default=1, metavar="K", help="hallucinated captions for each (default: 1)")
    add(
        "--types",
        type=_weighted(KINDS, 0),
        nargs="+",
        metavar="KIND[=WEIGHT]",
        help=f"kinds of hallucination and their weights: {', '.join(KINDS)} (default: all alike)",
    )
    add("--seed", type=int, default=0, help="of every random choice (default: 0)")
    add(
        "--workers",
        type=whole,
        metavar="N",
        help="processes of rules (default: cores), requests in flight of api (16)",
    )
    add("--limit", type=whole, metavar="N", help="only the first N records; the same command without it goes on")
    add("--bad-records", choices=("refuse", "skip"), default="refuse", help="those without a caption (default: refuse)")
    add("--replace", action="store_true", help="rewrite records that have hallucinated captions, too")
    add("--restart", action="store_true", help="throw an earlier run's answers away and replace OUTPUT")
    add("--report", action="store_true", help="write OUTPUT's .report.md, .json and .png beside it")
    add("--dry-run", action="store_true", help="read the input, estimate tokens and cost, and stop")

    add(
        "--prompt-file",
        metavar="FILE",
        help="system prompt in place of the paper's (text), or prompt, examples, temperature, attempts, price, "
        "max_cost, key_env, length_ratio ... (.yaml)",
    )

    group = parser.add_argument_group("source api (the key comes from the environment alone)")
    add = group.add_argument
    add("--model", metavar="NAME", help="the model's name at the endpoint")
    add("--base-url", metavar="URL", help="of a vLLM, SGLang or Ollama server, say (default: OpenAI's)")
    add(
        "--write-requests",
        metavar="FILE",
        help="write what is to be asked, as OpenAI's batches and vLLM's take it; stop",
    )
    add("--read-results", metavar="FILE", nargs="+", help="read what came of it, in any order, also a part of it")


def _depends(args, sources, types, settings):
    """What the answers depend on: a run is only gone on with under the same."""
    depends = {
        "input_name": os.path.basename(args.input),
        "version": __version__,
        "source": sources,
        "per_caption": args.per_caption,
        "types": types,
        "seed": args.seed,
        "length_ratio": list(settings.length_ratio),
        "replace": args.replace,
    }
    if "rules" in sources:
        depends["vocabulary"] = lexicon.digest()
    if "api" in sources:
        prompt = Prompt(settings.prompt, settings.examples).digest()
        depends |= {"model": args.model, "prompt": prompt}
        depends |= {"temperature": settings.temperature, "attempts": settings.attempts}
    return depends


def _check(args, sources):
    if "api" in sources and not args.model:
        raise HaclError("--source api needs --model.")
    given = {"--model": args.model, "--write-requests": args.write_requests, "--read-results": args.read_results}
    given = [flag for flag, value in given.items() if value]
    if given and "api" not in sources:
        raise HaclError(f"{given[0]} is for --source api, which was not given.")
    if args.write_requests and args.read_results:
        raise HaclError("--write-requests and --read-results: give one of them at a time.")
    if args.types and not sum(w for _, w in args.types):
        raise HaclError("--types: every weight is 0; give one kind at least a weight above 0.")


def _sources(args, sources, types, settings, run=None):
    """{name: (share, source)}; without a run, to have wrong settings refused."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    journal, made, checker = run and run.journal, {}, Checker(settings.length_ratio)
    for name, share in sources.items():
        if name == "rules":
            made[name] = share, RulesSource(types, args.seed, checker, args.workers or cores)
            continue
        more = {"checker": checker, "settings": settings, "seed": args.seed}
        more["spent"] = dict(journal.usage.get("api", {})) if journal else {}
        if args.write_requests:
            made[name] = share, Asking(args.model, **more)
        elif args.read_results:
            told = {"paths": args.read_results, "run": run and run_id(run.header), "tries": run and journal.tries}
            made[name] = share, ResultFiles(**told, model=args.model, **more)
        else:
            endpoint = Endpoint(
                args.model,
                args.base_url,
                settings.key_env,
                timeout=settings.timeout,
                retries=settings.retries,
                concurrency=args.workers or 16,
                requests_per_minute=settings.requests_per_minute,
            )
            made[name] = share, ApiSource(endpoint, **more)
    return made


def _write_requests(args, run, sources):
    items = run.items(run.split(sources)["api"])
    asking = sources["api"][1]
    files, count = write_requests(asking, items, args.write_requests, run_id(run.header), run.journal.tries)
    print(f"{count} requests: {', '.join(files) or 'no file, nothing is left to ask'}.")
    if asking.stopped:
        print(f"  stopped early: {asking.stopped}", file=sys.stderr)
    print("What comes of them, in any order and also a part of it: the same command with --read-results FILE instead.")
    return 0


def main(args: argparse.Namespace) -> int:
    """Run the command. Exit status 0: every record was seen to; 1: some are left, and the same command goes on."""
    sources = {}
    for name, share in args.source or [("rules", 1.0)]:
        sources[name] = sources.get(name, 0) + share
    types = dict.fromkeys(KINDS, 1.0) if not args.types else {k: dict(args.types).get(k, 0.0) for k in KINDS}
    _check(args, sources)
    settings = read_settings(args.prompt_file) if args.prompt_file else Settings()
    if args.report:
        pyplot()  # refuse before any work is done
    if not args.dry_run:
        _sources(args, sources, types, settings)  # refuse wrong settings before the input is read
    run = Run(
        args.input,
        args.output,
        settings=_depends(args, sources, types, settings),
        per_caption=args.per_caption,
        types=types,
        seed=args.seed,
        bad_records=args.bad_records,
        replace=args.replace,
        limit=args.limit,
        restart=args.restart,
    )
    survey = run.survey
    print(
        f"{args.input}: {survey.records} records, {survey.captions} captions to rewrite, "
        f"{len(survey.problems)} bad records."
    )
    if args.dry_run or "api" in sources:
        _estimate(args, sources, survey, settings)
    if args.dry_run:
        return 0
    with run.open() as journal:
        cost = functools.partial(dollars, price=settings.price) if settings.price else None
        made = _sources(args, sources, types, settings, run)
        if args.write_requests:
            return _write_requests(args, run, made)
        try:
            stopped = run.ask(made, cost)
        except KeyboardInterrupt:
            done = sum(d == 1 for d in journal.done)
            print(f"\nstopped; {done} answers are safe in {journal.path}. The same command goes on.", file=sys.stderr)
            return 130
        run.assemble()
        found = run.summary()
        _say(args, cost, found, stopped)
        if args.report:
            print(f"report: {write_report(run, found, 'hacl-llava ' + shlex.join(_words(args)))}")
    return EXIT_INCOMPLETE if found["failed"] or found["to do"] and args.limit is None else 0


def _words(args):
    return sys.argv[1:] if sys.argv[1:2] == ["hallucinate"] else ["hallucinate", args.input, args.output]


def _estimate(args, sources, survey, settings):
    total = sum(sources.values())
    part = min(1, args.limit / survey.records) if args.limit else 1
    for name, share in sources.items():
        share *= part
        items = round(survey.captions * share / total)
        line = f"{name}: about {items} captions"
        if name != "rules":
            characters = round(survey.characters * share / total)
            prompt = Prompt(settings.prompt, settings.examples)
            found = estimate(prompt, items, characters, items * args.per_caption, settings.price)
            line += f", {found['input']} tokens in and {found['output']} out (estimated at 4 characters a token)"
            if found["dollars"] is not None:
                line += f", $ {found['dollars']:.2f} at {settings.price[0]:g} and {settings.price[1]:g} per million"
            else:
                line += "; give price: [IN, OUT] in the prompt file to see dollars"
        print(line + ".")


def _say(args, cost, found, stopped):
    kinds = ", ".join(f"{k} {found['kinds'][k]}" for k in KINDS)
    print(
        f"{args.output}: {found['with hallucinated captions']} of {found['records']} records have "
        f"hallucinated captions ({kinds})."
    )
    for reason, count in found["without"].most_common():
        which = found["without_records"][reason]
        shown = ", ".join(map(str, which[:5])) + (", ..." if count > 5 else "")
        print(f"  without: {count} ({reason}): record {shown}")
    for source, usage in found["usage"].items():
        paid = f", $ {cost(usage):.2f}" if cost and source == "api" else ""
        print(f"  spent by {source}: {usage.get('input', 0)} tokens in, {usage.get('output', 0)} out{paid}")
    for sentence in stopped:
        print(f"  stopped early: {sentence}", file=sys.stderr)
    if found["failed"]:
        print(f"  {found['failed']} failed; the same command asks for them again.", file=sys.stderr)
    if found["to do"] and not args.limit:
        print(f"  {found['to do']} are not asked for yet; the same command goes on.", file=sys.stderr)
