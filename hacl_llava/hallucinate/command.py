"""``hacl-llava hallucinate``: its arguments, and what they put together."""

import argparse
import functools
import os
import shlex
import sys
from dataclasses import dataclass

from .. import __version__
from ..common.endpoint import Endpoint
from ..common.options import argument, option, whole
from ..common.report import pyplot
from ..config import HaclError
from . import KINDS, lexicon
from .api import ApiSource, Asking, dollars, estimate
from .batch import ResultFiles, run_id, write_requests
from .checks import Checker
from .prompts import Prompt, Settings, read_settings
from .report import write_audit, write_report
from .run import EXIT_INCOMPLETE, SEVERAL, Run
from .source import RulesSource

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


_GROUPS = ("what is asked for", "how the run goes", "source api (the key comes from the environment alone)")
_asked, _going, _api = (functools.partial(option, group=group) for group in _GROUPS)


@dataclass
class HallucinateOptions:
    """add hallucinated captions to LLaVA-format data

    Give every caption of a LLaVA-format json hallucinated captions, the hard negatives of HACL. A run that was
    stopped or killed goes on when the same command is given again.
    """

    input: str = argument("LLaVA-format json or json lines, .gz or not", metavar="INPUT")
    output: str | None = argument(
        "with hallucinated captions; .json, .jsonl, .gz by its name; without it, --report measures INPUT",
        metavar="OUTPUT",
        nargs="?",
    )
    source: list[tuple[str, float]] | None = _asked(
        "rules (no network, no model; the default), api (an OpenAI-compatible endpoint, yours too); give it again to "
        "mix: --source rules=0.3 --source api=0.7",
        type=_weighted(SOURCES, 1e-9),
        action="append",
        metavar="NAME[=SHARE]",
    )
    per_caption: int = _asked("hallucinated captions for each", 1, type=whole, metavar="K")
    types: list[tuple[str, float]] | None = _asked(
        f"kinds of hallucination and their weights: {', '.join(KINDS)} (default: all alike)",
        type=_weighted(KINDS, 0),
        nargs="+",
        metavar="KIND[=WEIGHT]",
    )
    choose: str | None = _asked("blind: text alone tells nothing (default: of rules)", choices=("blind", "random"))
    likelihood_model: str | None = _asked("a causal LM: none that it finds far less likely", metavar="PATH")
    seed: int = _asked("of every random choice", 0)
    prompt_file: str | None = _asked(
        "system prompt in place of the paper's (text), or prompt, examples, temperature, attempts, price, max_cost, "
        "key_env, length_ratio ... (.yaml)",
        metavar="FILE",
    )
    workers: int | None = _going("processes of rules (all cores), requests of api (16)", type=whole, metavar="N")
    limit: int | None = _going("only the first N records; without it the run goes on", type=whole, metavar="N")
    bad_records: str = _going("those without a caption", "refuse", choices=("refuse", "skip"))
    replace: bool = _going("rewrite records that have hallucinated captions, too", False)
    restart: bool = _going("throw an earlier run's answers away and replace OUTPUT", False)
    report: bool = _going("measure OUTPUT: .report.md, .json and .png beside it", False)
    dry_run: bool = _going("read the input, estimate tokens and cost, and stop", False)
    model: str | None = _api("the model's name at the endpoint", metavar="NAME")
    base_url: str | None = _api("of vLLM, SGLang or Ollama, say (default: OpenAI's)", metavar="URL")
    write_requests: str | None = _api("write what is to be asked, as OpenAI's batches take it; stop", metavar="FILE")
    read_results: list[str] | None = _api("read what came of it, in any order, also a part", nargs="+", metavar="FILE")


def _depends(options: HallucinateOptions, sources, types, settings):
    """What the answers depend on: a run is only gone on with under the same."""
    depends = {
        "input_name": os.path.basename(options.input),
        "version": __version__,
        "source": sources,
        "per_caption": options.per_caption,
        "types": types,
        "seed": options.seed,
        "length_ratio": list(settings.length_ratio),
        "replace": options.replace,
    }
    if blind := _blind(options, sources):
        depends |= {"choose blind": blind, "likelihood_model": options.likelihood_model}
    if "rules" in sources:
        depends["vocabulary"] = lexicon.digest()
    if "api" in sources:
        prompt = Prompt(settings.prompt, settings.examples).digest()
        depends |= {"model": options.model, "prompt": prompt}
        depends |= {"temperature": settings.temperature, "attempts": settings.attempts}
    return depends


def _blind(options: HallucinateOptions, sources):
    """Names of the sources among whose candidates the choice is blind."""
    return [name for name in sources if options.choose == "blind" or name == "rules" and options.choose is None]


def _check(options: HallucinateOptions, sources):
    if options.output is None:
        raise HaclError("OUTPUT is missing: give the name of the json to write, or --report to measure INPUT as it is.")
    if options.likelihood_model and not _blind(options, sources):
        raise HaclError("--likelihood-model is for --choose blind.")
    if "api" in sources and not options.model:
        raise HaclError("--source api needs --model.")
    given = [name for name in ("model", "write_requests", "read_results") if getattr(options, name)]
    if given and "api" not in sources:
        raise HaclError(f"--{given[0].replace('_', '-')} is for --source api, which was not given.")
    if options.write_requests and options.read_results:
        raise HaclError("--write-requests and --read-results: give one of them at a time.")
    if options.types and not sum(w for _, w in options.types):
        raise HaclError("--types: every weight is 0; give one kind at least a weight above 0.")


def _sources(options: HallucinateOptions, sources, types, settings, run=None, likelihood=None):
    """{name: (share, source)}; without a run, to have wrong settings refused."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    journal, made, checker = run and run.journal, {}, Checker(settings.length_ratio)
    for name, share in sources.items():
        if name == "rules":
            made[name] = share, RulesSource(types, options.seed, checker, options.workers or cores, likelihood)
            continue
        more = {"checker": checker, "settings": settings, "seed": options.seed}
        more["spent"] = dict(journal.usage.get("api", {})) if journal else {}
        if options.write_requests:
            made[name] = share, Asking(options.model, **more)
        elif options.read_results:
            told = {"paths": options.read_results, "run": run and run_id(run.header), "tries": run and journal.tries}
            made[name] = share, ResultFiles(**told, model=options.model, **more)
        else:
            endpoint = Endpoint(
                options.model,
                options.base_url,
                settings.key_env,
                timeout=settings.timeout,
                retries=settings.retries,
                concurrency=options.workers or 16,
                requests_per_minute=settings.requests_per_minute,
            )
            made[name] = share, ApiSource(endpoint, **more)
    return made


def _balance(options: HallucinateOptions, run, sources):
    """Let the rules choose blindly, if they have anything left to do."""
    if "rules" in _blind(options, sources) and run.remaining(run.split(sources)["rules"]):
        print("rules: the choice is balanced first, from a sample of the captions.", flush=True)
        sources["rules"][1].balance(run.every())


def _write_requests(options: HallucinateOptions, run, sources):
    items = run.items(run.split(sources)["api"], several="api" in run.several)
    asking = sources["api"][1]
    files, count = write_requests(asking, items, options.write_requests, run_id(run.header), run.journal.tries)
    print(f"{count} requests: {', '.join(files) or 'no file, nothing is left to ask'}.")
    if asking.stopped:
        print(f"  stopped early: {asking.stopped}", file=sys.stderr)
    print("What comes of them, in any order and also a part of it: the same command with --read-results FILE instead.")
    return 0


def run(options: HallucinateOptions) -> int:
    """Run the command. Exit status 0: every record was seen to; 1: some are left, and the same command goes on."""
    if options.output is None and options.report:
        print(f"report: {write_audit(options.input, options.seed, _likelihood(options), _command(options))}")
        return 0
    sources = {}
    for name, share in options.source or [("rules", 1.0)]:
        sources[name] = sources.get(name, 0) + share
    types = dict.fromkeys(KINDS, 1.0) if not options.types else {k: dict(options.types).get(k, 0.0) for k in KINDS}
    _check(options, sources)
    settings = read_settings(options.prompt_file) if options.prompt_file else Settings()
    if options.report:
        pyplot()  # refuse before any work is done
    if not options.dry_run:
        _sources(options, sources, types, settings)  # refuse wrong settings before the input is read
    run = Run(
        options.input,
        options.output,
        settings=_depends(options, sources, types, settings),
        per_caption=options.per_caption,
        types=types,
        seed=options.seed,
        several={name for name in _blind(options, sources) if name != "rules"},
        bad_records=options.bad_records,
        replace=options.replace,
        limit=options.limit,
        restart=options.restart,
    )
    survey = run.survey
    print(
        f"{options.input}: {survey.records} records, {survey.captions} captions to rewrite, "
        f"{len(survey.problems)} bad records."
    )
    if options.dry_run or "api" in sources:
        _estimate(options, sources, survey, settings)
    if options.dry_run:
        return 0
    with run.open() as journal:
        cost = functools.partial(dollars, price=settings.price) if settings.price else None
        likelihood = _likelihood(options)
        made = _sources(options, sources, types, settings, run, likelihood)
        if options.write_requests:
            return _write_requests(options, run, made)
        try:
            _balance(options, run, made)
            stopped = run.ask(made, cost)
        except KeyboardInterrupt:
            done = sum(d == 1 for d in journal.done)
            print(f"\nstopped; {done} answers are safe in {journal.path}. The same command goes on.", file=sys.stderr)
            return 130
        run.balance(likelihood)
        run.assemble()
        found = run.summary()
        _say(options, cost, found, stopped)
        if options.report:
            print(f"report: {write_report(run, found, _command(options), likelihood)}")
    return EXIT_INCOMPLETE if found["failed"] or found["to do"] and options.limit is None else 0


def _likelihood(options: HallucinateOptions):
    if not options.likelihood_model:
        return None
    from .likelihood import Likelihood  # torch

    return Likelihood(options.likelihood_model)


def _command(options: HallucinateOptions):
    given = [options.input, *([options.output] if options.output else ["--report"])]
    words = sys.argv[1:] if sys.argv[1:2] == ["hallucinate"] else ["hallucinate", *given]
    return "hacl-llava " + shlex.join(words)


def _estimate(options: HallucinateOptions, sources, survey, settings):
    total = sum(sources.values())
    part = min(1, options.limit / survey.records) if options.limit else 1
    for name, share in sources.items():
        share *= part
        items = round(survey.captions * share / total)
        line = f"{name}: about {items} captions"
        if name != "rules":
            characters = round(survey.characters * share / total)
            prompt = Prompt(settings.prompt, settings.examples)
            each = options.per_caption * (SEVERAL if name in _blind(options, sources) else 1)
            found = estimate(prompt, items, characters, items * each, settings.price)
            line += f", {found['input']} tokens in and {found['output']} out (estimated at 4 characters a token)"
            if found["dollars"] is not None:
                line += f", $ {found['dollars']:.2f} at {settings.price[0]:g} and {settings.price[1]:g} per million"
            else:
                line += "; give price: [IN, OUT] in the prompt file to see dollars"
        print(line + ".")


def _say(options: HallucinateOptions, cost, found, stopped):
    kinds = ", ".join(f"{k} {found['kinds'][k]}" for k in KINDS)
    print(
        f"{options.output}: {found['with hallucinated captions']} of {found['records']} records have "
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
    if found["to do"] and not options.limit:
        print(f"  {found['to do']} are not asked for yet; the same command goes on.", file=sys.stderr)
