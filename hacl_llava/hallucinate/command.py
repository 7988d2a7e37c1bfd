"""``hacl-llava hallucinate``: its arguments, and what they put together."""

import argparse
import functools
import os
import shlex
import sys

from .. import __version__
from ..config import HaclError
from . import KINDS
from .checks import RATIO

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


def whole(text):
    """An argparse type: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed is a whole number from 1")
    return int(text)


def _amount(text):
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed is a number from 0")
    return value


def add_arguments(parser):
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
    add(
        "--length-ratio",
        type=_amount,
        nargs=2,
        default=RATIO,
        metavar=("MIN", "MAX"),
        help="in tokens (default: 0.7 1.4)",
    )
    add("--bad-records", choices=("refuse", "skip"), default="refuse", help="those without a caption (default: refuse)")
    add("--replace", action="store_true", help="rewrite records that have hallucinated captions, too")
    add("--restart", action="store_true", help="throw an earlier run's answers away and replace OUTPUT")
    add("--report", action="store_true", help="write OUTPUT's .report.md, .json and .png beside it")
    add("--dry-run", action="store_true", help="read the input, estimate tokens and cost, and stop")

    group = parser.add_argument_group("source api (the key comes from the environment alone)")
    add = group.add_argument
    add("--prompt-file", metavar="FILE", help="system prompt in place of the paper's")
    add("--examples", metavar="FILE", help='json lines with "caption", "hallucinated_caption" and "kind", shown first')
    add("--temperature", type=_amount, default=1.0, help="of sampling (default: 1.0)")
    add("--max-output-tokens", type=whole, metavar="N", help="of one answer (default: by the caption's length)")
    add("--attempts", type=whole, default=3, metavar="N", help="for each caption, until checks pass (default: 3)")
    add("--model", metavar="NAME", help="the model's name at the endpoint")
    add("--base-url", metavar="URL", help="of a vLLM, SGLang or Ollama server, say (default: OpenAI's)")
    add(
        "--api-key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="variable with the key (default: OPENAI_API_KEY)",
    )
    add("--response-format", choices=("schema", "json", "text"), default="schema", help="(default: schema)")
    add("--timeout", type=_amount, default=60.0, metavar="S", help="seconds for one request (default: 60)")
    add("--retries", type=int, default=6, metavar="N", help="of a request after 429, 5xx, time-outs (default: 6)")
    add("--requests-per-minute", type=_amount, metavar="N", help="at most (default: no limit but the endpoint's)")
    add("--price", type=_amount, nargs=2, metavar=("IN", "OUT"), help="dollars per million tokens, for the cost shown")
    add("--max-cost", type=_amount, metavar="DOLLARS", help="stop before more is spent, over all starts of this run")
    add(
        "--write-requests",
        metavar="FILE",
        help="write what is to be asked, as OpenAI's batches and vLLM's take it; stop",
    )
    add("--read-results", metavar="FILE", nargs="+", help="read what came of it, in any order, also a part of it")


def _settings(args, sources, types, prompt):
    """What the answers depend on: a run is only gone on with under the same."""
    settings = {
        "input_name": os.path.basename(args.input),
        "version": __version__,
        "source": sources,
        "per_caption": args.per_caption,
        "types": types,
        "seed": args.seed,
        "length_ratio": list(args.length_ratio),
        "replace": args.replace,
    }
    if "rules" in sources:
        from .lexicon import digest

        settings["vocabulary"] = digest()
    if "api" in sources:
        settings["model"] = args.model
    if prompt is not None:
        settings |= {"prompt": prompt.digest(), "temperature": args.temperature, "attempts": args.attempts}
    return settings


def _check(args, sources):
    if "api" in sources and not args.model:
        raise HaclError("--source api needs --model.")
    if "api" not in sources and args.model:
        raise HaclError("--model is for --source api, which was not given.")
    files = {"--write-requests": args.write_requests, "--read-results": args.read_results}
    given = [flag for flag, value in files.items() if value]
    if given and "api" not in sources:
        raise HaclError(f"{given[0]} is for --source api, which was not given.")
    if len(given) > 1:
        raise HaclError("--write-requests and --read-results: give one of them at a time.")
    low, high = args.length_ratio
    if not low <= 1 <= high:
        raise HaclError(f"--length-ratio {low} {high}: allowed is MIN <= 1 <= MAX.")
    if args.max_cost is not None and args.price is None:
        raise HaclError("--max-cost needs --price IN OUT, the dollars per million tokens that the endpoint asks.")
    if args.types and not sum(w for _, w in args.types):
        raise HaclError("--types: every weight is 0; give one kind at least a weight above 0.")


def _asking(args, checker, prompt, journal):
    """Settings of what is asked, whether by HTTP or in files."""
    return {
        "model": args.model,
        "checker": checker,
        "prompt": prompt,
        "temperature": args.temperature,
        "max_output_tokens": args.max_output_tokens,
        "attempts": args.attempts,
        "response_format": args.response_format,
        "price": tuple(args.price) if args.price else None,
        "max_cost": args.max_cost,
        "spent": dict(journal.usage.get("api", {})) if journal else {},
        "seed": args.seed,
    }


def _sources(args, sources, types, checker, prompt, run=None):
    """{name: (share, source)}; without a run, to have wrong settings refused."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    journal, made = run and run.journal, {}
    for name, share in sources.items():
        if name == "rules":
            from .rules import RulesSource

            made[name] = share, RulesSource(types, args.seed, checker, args.workers or cores)
            continue
        asking = _asking(args, checker, prompt, journal)
        if args.write_requests or args.read_results:
            from .api import Asking
            from .batch import ResultFiles, run_id

            told = {"paths": args.read_results, "run": run and run_id(run.header), "tries": run and journal.tries}
            # max_completion_tokens is what OpenAI's models of today take, and vLLM
            asking["limit"] = "max_completion_tokens"
            made[name] = share, ResultFiles(**told, **asking) if args.read_results else Asking(**asking)
        else:
            from .api import ApiSource

            more = {"base_url": args.base_url, "key_env": args.api_key_env, "timeout": args.timeout}
            more |= {"retries": args.retries, "requests_per_minute": args.requests_per_minute}
            made[name] = share, ApiSource(concurrency=args.workers or 16, **more, **asking)
    return made


def _write_requests(args, run, sources):
    from .batch import run_id, write_requests

    items = run.items(run.split(sources)["api"])
    asking = sources["api"][1]
    files, count = write_requests(asking, items, args.write_requests, run_id(run.header), run.journal.tries)
    print(f"{count} requests: {', '.join(files) or 'no file, nothing is left to ask'}.")
    if asking.stopped:
        print(f"  stopped early: {asking.stopped}", file=sys.stderr)
    print("What comes of them, in any order and also a part of it: the same command with --read-results FILE instead.")
    return 0


def main(args):
    """Run the command. Exit status 0: every record was seen to; 1: some are left, and the same command goes on."""
    sources = {}
    for name, share in args.source or [("rules", 1.0)]:
        sources[name] = sources.get(name, 0) + share
    types = dict.fromkeys(KINDS, 1.0) if not args.types else {k: dict(args.types).get(k, 0.0) for k in KINDS}
    _check(args, sources)
    if args.report:
        from .report import need_matplotlib

        need_matplotlib()
    prompt = None
    if "api" in sources:
        from .prompts import Prompt, read_examples, read_prompt

        more = {"system": read_prompt(args.prompt_file)} if args.prompt_file else {}
        prompt = Prompt(**more, examples=read_examples(args.examples) if args.examples else ())
    from .checks import Checker
    from .run import EXIT_INCOMPLETE, Run

    checker = Checker(tuple(args.length_ratio))
    if not args.dry_run:
        _sources(args, sources, types, checker, prompt)  # refuse wrong settings before the input is read
    run = Run(
        args.input,
        args.output,
        settings=_settings(args, sources, types, prompt),
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
        _estimate(args, sources, survey, prompt)
    if args.dry_run:
        return 0
    with run.open() as journal:
        from .api import dollars

        cost = functools.partial(dollars, price=args.price) if args.price else None
        made = _sources(args, sources, types, checker, prompt, run)
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
        _say(args, run, found, stopped)
        if args.report:
            from .report import write_report

            print(f"report: {write_report(run, found, 'hacl-llava ' + shlex.join(_words(args)))}")
    return EXIT_INCOMPLETE if found["failed"] or found["to do"] and args.limit is None else 0


def _words(args):
    return sys.argv[1:] if sys.argv[1:2] == ["hallucinate"] else ["hallucinate", args.input, args.output]


def _estimate(args, sources, survey, prompt):
    total = sum(sources.values())
    part = min(1, args.limit / survey.records) if args.limit else 1
    for name, share in sources.items():
        share *= part
        items = round(survey.captions * share / total)
        line = f"{name}: about {items} captions"
        if name != "rules":
            from .api import estimate

            characters = round(survey.characters * share / total)
            found = estimate(prompt, items, characters, items * args.per_caption, tuple(args.price or ()) or None)
            line += f", {found['input']} tokens in and {found['output']} out (estimated at 4 characters a token)"
            if found["dollars"] is not None:
                line += f", $ {found['dollars']:.2f} at --price {args.price[0]:g} {args.price[1]:g}"
            else:
                line += "; give --price IN OUT to see dollars"
        print(line + ".")


def _say(args, run, found, stopped):
    from .api import dollars

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
        paid = f", $ {dollars(usage, args.price):.2f}" if args.price and source == "api" else ""
        print(f"  spent by {source}: {usage.get('input', 0)} tokens in, {usage.get('output', 0)} out{paid}")
    for sentence in stopped:
        print(f"  stopped early: {sentence}", file=sys.stderr)
    if found["failed"]:
        print(f"  {found['failed']} failed; the same command asks for them again.", file=sys.stderr)
    if found["to do"] and not args.limit:
        print(f"  {found['to do']} are not asked for yet; the same command goes on.", file=sys.stderr)
