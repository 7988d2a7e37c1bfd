"""``hacl-llava eval``: its arguments, and the run over tasks, questions and judgements."""

import argparse
import functools
import hashlib
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ..common import jsonl
from ..common.files import locked, read_json, write_json, write_text
from ..common.images import image_file
from ..common.report import as_markdown, provenance
from ..config import DataError, HaclError
from ..hallucinate.command import whole
from . import Question

_SHOWN = 10  # failures of a task that are printed one by one
_HOPELESS = 20  # failures in a row from the beginning that end a run
JUDGEMENT = 1024  # tokens of a verdict at most


def _api(text):
    if not text.startswith("api:") or not text[4:].strip():
        raise argparse.ArgumentTypeError(f"{text!r}: allowed is api: and a model's name, as api:gpt-4o")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give an argparse parser the command's arguments."""
    add = parser.add_argument
    add("--model", required=True, metavar="CHECKPOINT", help="folder or hub id, or api:NAME behind an endpoint")
    add("--base", metavar="LLM", help="the language model of a projector or LoRA")
    add("--vision-tower", metavar="PATH", help="folder or hub id, in place of config.json's")
    add("--images", required=True, metavar="DIR", help="the folder that the questions' images lie in")
    add("--output", required=True, metavar="OUT", help="folder for answers and results")
    add("--batch-size", type=whole, default=16, metavar="N", help="questions at a time (default: 16)")
    add("--max-new-tokens", type=whole, metavar="N", help="of an answer (default: each task's own)")
    add("--conv", metavar="NAME", help="conversation template (default: by the kind of checkpoint)")
    add("--limit", type=whole, metavar="N", help="only N questions of each task, drawn by --seed")
    add("--seed", type=int, default=0, help="of --limit and of the intervals (default: 0)")
    add("--bits", type=int, choices=(4, 8), help="load the language model quantized")
    add("--dtype", choices=("float16", "bfloat16", "float32"), help="(default: float16 on a GPU, else float32)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")

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


class Task:
    """One list of questions and the folder of what comes of it.

    Attributes:
        module: what reads and scores it (`pope`, ...). name: as people read it. questions: all of them; asked: those of
        this run. settings: what its answers depend on. judged: by a model, not by rules. journal: its answers.
    """

    def __init__(self, module: ModuleType, name: str, questions: list[Question], args: argparse.Namespace) -> None:
        from ..common.statistics import sample

        self.module, self.name, self.questions = module, "".join(c if c.isprintable() else " " for c in name), questions
        self.slug = re.sub(r"\W+", "-", self.name.lower()).strip("-") or "task"
        self.folder = Path(args.output, self.slug)
        self.asked = sample(questions, args.limit, args.seed) if args.limit else questions
        self.max_new_tokens = args.max_new_tokens or module.MAX_NEW_TOKENS
        text = json.dumps([[q.id, q.image, q.text] for q in questions])
        self.settings = {
            "task": self.name,
            "questions": hashlib.sha256(text.encode()).hexdigest(),
            "max_new_tokens": self.max_new_tokens,
        }
        self.scored_by = _scored_by(questions)
        self.judged = hasattr(module, "score_with")
        self.journal = None

    def pending(self) -> list[Question]:
        """The questions of this run that have no answer yet."""
        return [q for q in self.asked if "text" not in self.journal.lines.get(q.id, ())]


def _scored_by(questions):
    """Settings that figures depend on, but answers do not: digests of the truth, and of lists of words where there are.

    By content: the same annotations in another folder are the same.
    """
    paths = ("synonyms", "folder")
    truth = [[q.id, {name: value for name, value in q.facts.items() if name not in paths}] for q in questions]
    found = {"truth": _digest(truth)}
    facts = {name: value for q in questions for name, value in q.facts.items() if name in paths}
    if "synonyms" in facts:
        own = facts["synonyms"] is None
        found["synonyms"] = "own" if own else _digest(Path(facts["synonyms"]).read_bytes().hex())
    if "folder" in facts:
        files = [Path(facts["folder"], name) for name in ("relation.json", "safe_words.txt")]
        found["words"] = _digest([file.read_bytes().hex() for file in files])
    return found


def _tasks(args):
    """Read all question files."""
    found = []

    def add(module, questions, name):
        found.extend(
            (module, n, q) for n, q in (questions if isinstance(questions, dict) else {name: questions}).items()
        )

    if args.pope:
        from . import pope

        for path in args.pope:
            add(pope, pope.read(path), f"POPE {Path(path).stem}")
    if args.chair:
        from . import chair

        add(chair, chair.read(args.chair, args.chair_synonyms), "CHAIR")
    if args.amber:
        from . import amber

        add(amber, amber.read(args.amber), "AMBER")
    if args.mmhal:
        from . import mmhal

        add(mmhal, mmhal.read(args.mmhal), "MMHal-Bench")
    if not found:
        raise HaclError("no task: give --pope FILE ..., --chair FILE ..., --amber FOLDER or --mmhal FILE.")
    tasks = [Task(*task, args) for task in found]
    twice = [slug for slug, count in Counter(t.slug for t in tasks).items() if count > 1]
    if twice:
        raise HaclError(f"{twice[0]}: two of the question files give a task of this name; rename one, or leave it out.")
    return tasks


def _check(args, tasks):
    """Refuse arguments that do not go together; returns the judge's endpoint, or None."""
    local = {"--base": args.base, "--vision-tower": args.vision_tower, "--conv": args.conv, "--bits": args.bits}
    local |= {"--dtype": args.dtype, "--device": args.device}
    if args.model.startswith("api:"):
        _api_name(args.model)
        if given := [flag for flag, value in local.items() if value is not None]:
            raise HaclError(f"{given[0]} is for a checkpoint; {args.model} is behind an endpoint.")
    if args.chair_synonyms and not args.chair:
        raise HaclError("--chair-synonyms is for --chair, which was not given.")
    for flag, value in (("--judge", args.judge), ("--mmhal-rubric", args.mmhal_rubric)):
        if value and not args.mmhal:
            raise HaclError(f"{flag} is for --mmhal, which was not given.")
    if args.mmhal and not args.judge:
        raise HaclError("--mmhal needs --judge api:NAME, the model that judges its answers (the paper's is GPT-4).")
    if not os.path.isdir(args.images):
        raise HaclError(f"--images {args.images}: is no folder; give the one that the questions' images lie in.")
    if not args.mmhal:
        return None
    from ..common.endpoint import Endpoint
    from .mmhal import read_rubric

    url, key_env = args.judge_base_url or args.base_url, args.judge_key_env or args.key_env
    return _Judge(Endpoint(args.judge[4:], url, key_env, concurrency=args.concurrency), read_rubric(args.mmhal_rubric))


def _api_name(model):
    name = model[4:].strip()
    if not name:
        raise HaclError(f"--model {model}: has no name; give api:NAME, as api:gpt-4o.")
    return name


def _check_images(tasks, folder):
    """Refuse a wrong image folder before minutes of loading."""

    if not any(task.pending() for task in tasks):
        return
    # of all questions: those that are left may be the few whose image is missing, which are no reason to refuse
    names = list(dict.fromkeys(q.image for task in tasks for q in task.asked))
    missing = []
    for name in names:
        try:
            image_file(folder, name)
        except HaclError as error:
            missing.append(error)
    if 2 * len(missing) > len(names):
        raise HaclError(
            f"--images {folder}: {len(missing)} of {len(names)} images that are asked about are not there; the first: "
            f"{missing[0]}"
        )


class _Checkpoint:
    """A checkpoint to be loaded when it is known that there is something to ask."""

    def __init__(self, args):
        from ..chat import check_arguments
        from ..checkpoint import local_folder
        from .journal import digest_of

        check_arguments(args)
        self.args, folder = args, local_folder(args.model)
        here = Path(args.model).exists()
        self.name = _short_name(args.model)
        self.settings = {
            "model": str(Path(args.model).absolute()) if here else args.model,
            "digest": digest_of(folder),
            "base": args.base and (str(Path(args.base).absolute()) if Path(args.base).exists() else args.base),
            "base_digest": args.base and digest_of(local_folder(args.base)),
            "vision_tower": args.vision_tower,
            "bits": args.bits,
        }
        if args.conv:
            self.settings["template"] = args.conv
        if args.dtype:
            self.settings["dtype"] = args.dtype

    def load(self):
        import contextlib
        import warnings

        from ..chat import default_template
        from ..loading import load_pretrained
        from .answers import Answerer

        args = self.args
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`do_sample` is set to `False`")  # vicuna's generation_config
            loaded = load_pretrained(
                args.model,
                args.base,
                device=args.device,
                dtype=args.dtype,
                bits=args.bits,
                vision_tower=args.vision_tower,
            )
        config = loaded.model.config
        template = args.conv or default_template(args.model, args.base, config, loaded.tokenizer)
        self.settings |= {"template": template, "dtype": str(loaded.model.dtype).removeprefix("torch.")}
        answerer = Answerer(loaded, template, args.batch_size)
        _say(f"{args.model} on {loaded.model.device}, conversation template {template}.")
        if answerer.plain:
            _say(
                "This template asks nothing: every answer is the image's caption. If the language model was trained on "
                "instructions, --conv v1 (or its own) asks them."
            )
        return answerer


class _Api:
    def __init__(self, args):
        from ..common.endpoint import Endpoint

        self.name = args.model
        self.endpoint = Endpoint(_api_name(args.model), args.base_url, args.key_env, concurrency=args.concurrency)
        self.settings = {"model": args.model, "base_url": self.endpoint.url}

    def load(self):
        from .endpoint import EndpointAnswerer

        self.endpoint.known = self.answered
        return EndpointAnswerer(self.endpoint)


class _Judge(NamedTuple):
    endpoint: Any
    rubric: Any


def _short_name(model):
    parts = [part for part in re.split(r"[/\\]", str(model).rstrip("/\\")) if part not in ("", ".")]
    if not parts or parts[-1] == "..":
        parts = Path(model).absolute().resolve().parts
    return "/".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


def _say(text):
    print(text, file=sys.stderr, flush=True)


def main(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0; questions that failed are counted in the results, and the same command asks them again.

    Raises:
        HaclError: something that was given is not right, which is seen before the model is loaded; or an endpoint gave
            up, or every image fails. Answers so far are kept.
    """
    from .journal import Answers, check_settings, write_settings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported
    tasks = _tasks(args)
    judge, here = _check(args, tasks), os.path.abspath(args.images)
    with locked(Path(args.output, ".lock"), args.output, "choose another --output"):
        try:
            source = _Api(args) if args.model.startswith("api:") else _Checkpoint(args)
            for path in Path(args.output).glob("*/settings.json"):
                check_settings(path, source.settings)  # other tasks there are of the same model, too
            for task in tasks:
                old = check_settings(task.folder / "settings.json", {**source.settings, **task.settings})
                if old.get("images", here) != here:  # moved, mostly; but these may be others under the same names
                    _say(
                        f"{task.name}: the answers in {task.folder} were given with --images {old['images']}, now it "
                        f"is {here}; they are kept. If these are other images, choose another --output."
                    )
                task.journal = Answers(task.folder / "answers.jsonl", "question_id")
            _check_images(tasks, args.images)
            model, results = None, []
            try:
                for task in tasks:
                    if task.pending():
                        if model is None:
                            source.answered = any("text" in line for t in tasks for line in t.journal.lines.values())
                            model = source.load()
                        settings = {**source.settings, **task.settings}
                        check_settings(task.folder / "settings.json", settings)
                        task.folder.mkdir(exist_ok=True)
                        write_settings(task.folder / "settings.json", {**settings, "images": here})
                        _ask(task, model, source.name, args.images)
                    if not task.judged:
                        results.append(_finish(task, source.name, None, args))
                model = None  # its memory, before a judge's hours
                results += [_finish(task, source.name, judge, args) for task in tasks if task.judged]
            finally:  # what ends one task takes nothing from the others
                if results:
                    _report(Path(args.output), results)
        except OSError as error:
            raise HaclError(f"{error.filename or args.output}: {error.strerror}; answers so far are kept.") from None
        except KeyboardInterrupt:
            _say(f"\nstopped; answers so far are in {args.output}. The same command goes on.")
            return 130
        finally:
            for task in tasks:
                if task.journal:
                    task.journal.close()
    return 0


def _ask(task, model, name, images):
    """Get the answers that are missing, and write them down."""
    from tqdm import tqdm

    pending = task.pending()
    failed, any_answer = 0, len(pending) < len(task.asked)
    with tqdm(total=len(task.asked), initial=len(task.asked) - len(pending), desc=task.name, file=sys.stderr) as bar:
        for answer in model.answers(pending, images, task.max_new_tokens):
            question = answer.question
            line = {"question_id": question.id, "image": question.image, "prompt": question.text}
            if answer.error is None:
                line["text"], any_answer = answer.text, True
            else:
                line["error"], failed = answer.error, failed + 1
                if failed <= _SHOWN:
                    more = " (no more of these are shown)" if failed == _SHOWN else ""
                    bar.write(f"{task.name}, question {question.id}: {answer.error}{more}", file=sys.stderr)
            task.journal.append({**line, "model_id": name})
            bar.update()
            if failed >= _HOPELESS and not any_answer:
                raise HaclError(
                    f"{task.name}: the first {failed} questions all failed, the last so: {answer.error} See to --images"
                    f" {images} and to the model; the same command asks them again."
                )


def _finish(task, name, judge, args):
    """Judge or score a task's answers; write items.jsonl and results.json."""
    from ..common.statistics import summarise

    task.journal.sort(q.id for q in task.questions)
    scores = _judge(task, judge) if task.judged else {}
    items = []
    for question in task.asked:
        line = task.journal.lines.get(question.id, {"error": "not asked"})
        item = {"id": question.id, "image": question.image, "question": question.text}
        if "label" in question.facts:
            item["label"] = question.facts["label"]
        if "text" not in line:
            items.append({**item, "error": line["error"]})
            continue
        item["answer"] = line["text"]
        items.append({**item, **(scores.get(question.id) or task.module.score(question, line["text"]))})
    metrics = summarise(task.module.METRICS, items, [item["image"] for item in items], seed=args.seed)
    scored = [item for item in items if "counts" in item]
    sums = Counter()
    for item in scored:
        sums.update(item["counts"])
    counts = {"questions": len(items), "scored": len(scored), "failed": len(items) - len(scored)}
    counts["unclear"] = sums.get("unclear", 0)
    counts |= {n: v for n, v in sums.items() if n not in counts}
    result = {"task": task.name, "kind": task.module.NAME, "model": name, "metrics": metrics, "counts": counts}
    if task.judged:
        result["judge"] = {"name": judge.endpoint.model, "url": judge.endpoint.url, "rubric": judge.rubric.name}
        result["judge"]["rubric_sha256"] = _digest(judge.rubric)
    settings = read_json(task.folder / "settings.json")
    settings |= task.scored_by
    if "judge" in result:
        settings |= {"judge": judge.endpoint.model, "rubric": judge.rubric.name}
    result |= {"images": os.path.abspath(args.images), "settings": settings, "provenance": provenance(args.seed)}
    jsonl.write(task.folder / "items.jsonl", items)
    write_json(task.folder / "results.json", result)
    return result


def _digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _judge(task, judge):
    """{question id: what the judge's verdict gives}, a verdict that cannot be had as {"error"}.

    Verdicts are kept in judgements.jsonl and asked for once for each judge, rubric and answer.
    """
    from tqdm import tqdm

    from ..common.endpoint import NotAnswered
    from .journal import Answers

    endpoint = judge.endpoint
    who = {"judge": endpoint.model, "url": endpoint.url, "rubric": _digest(judge.rubric)}
    journal = Answers(task.folder / "judgements.jsonl", "question_id", "judge", "url", "rubric", "answer")
    answers = {q.id: task.journal.lines.get(q.id, {}).get("text") for q in task.asked}

    def key(question):
        return (question.id, *who.values(), answers[question.id])

    def one(question):
        ask = functools.partial(endpoint.ask, max_tokens=JUDGEMENT)
        try:
            return {"verdict": task.module.score_with(question, answers[question.id], ask, judge.rubric)}
        except task.module.NoVerdict as error:  # it was asked for again by then
            return {"error": f"no verdict from the judge: {error}"}

    endpoint.known = any("verdict" in line for line in journal.lines.values())
    asked = [q for q in task.asked if answers[q.id] is not None]
    todo = [q for q in asked if "verdict" not in journal.lines.get(key(q), ())]
    failed = 0
    try:
        with tqdm(
            total=len(asked), initial=len(asked) - len(todo), desc=f"judging {task.name}", file=sys.stderr
        ) as bar:
            for question, verdict in endpoint.each(one, todo):
                if isinstance(verdict, NotAnswered):
                    verdict = {"error": f"no verdict from the judge: {verdict}"}
                line = {"question_id": question.id, **who, "answer": answers[question.id], **verdict}
                journal.append(line)
                if "error" in verdict:
                    failed += 1
                    if failed <= _SHOWN:
                        bar.write(f"{task.name}, question {question.id}: {verdict['error']}", file=sys.stderr)
                bar.update()
    finally:
        journal.close()
    journal.sort(key(q) for q in asked)
    found = {q.id: journal.lines[key(q)] for q in asked}
    return {i: line.get("verdict") or {"error": line["error"]} for i, line in found.items()}


def _report(output, results):
    """Write evaluation.json and results.md over all tasks in the folder; print the table."""
    mine = {result["task"] for result in results}
    for path in sorted(output.glob("*/results.json")):
        try:
            other = json.loads(path.read_text(encoding="utf-8"))
            if other["task"] not in mine:
                results.append(other)
                mine.add(other["task"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: is not what an evaluation writes ({error}); remove it.") from None
    entries, rows, undefined = [], [], []
    for result in sorted(results, key=lambda r: r["task"]):
        counts = result["counts"]
        last = counts["scored"], counts["failed"], counts["unclear"]
        for metric, found in result["metrics"].items():
            value, interval = _number(found["value"]), [_number(v) for v in found["interval"]]
            if value is None:
                undefined.append(f"{metric} of {result['task']}")
                continue
            low_high = "–" if None in interval else f"{interval[0]:.3f} – {interval[1]:.3f}"
            rows.append((result["task"], metric, f"{value:.3f}", low_high, *last))
            entries.append({"task": result["task"], "metric": metric, "value": value})
            if None not in interval:
                entries[-1]["interval"] = interval
        if all(_number(found["value"]) is None for found in result["metrics"].values()):
            rows.append((result["task"], "–", "–", "–", *last))
    if entries:
        write_json(output / "evaluation.json", entries)
    models = sorted({result["model"] for result in results})
    judges = sorted({f"{r['judge']['name']} ({r['judge']['rubric']})" for r in results if "judge" in r})
    head = ("task", "metric", "value", "95 % interval", "scored", "failed", "unclear")
    notes = ["Intervals: percentile bootstrap over images."]
    if undefined:
        notes.append(f"Undefined, as there is nothing to divide by: {', '.join(undefined)}.")
    if judges:
        notes.append(f"Judge: {', '.join(judges)}.")
    text = as_markdown([("heading", 1, ", ".join(models)), ("table", head, rows), *(("text", note) for note in notes)])
    write_text(output / "results.md", text)
    print(text)
    failed = sum(result["counts"]["failed"] for result in results)
    if failed:
        _say(f"{failed} question{'s' * (failed > 1)} failed, counted in no figure; the same command asks again.")
    print(f"{output}/results.md: written.")


def _number(value):
    return value if value is not None and value == value and abs(value) != float("inf") else None
