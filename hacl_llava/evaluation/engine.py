"""Tasks of an evaluation: what is missing is asked, written down as it comes, judged, scored and put into a table.

Answers and verdicts are lines of journals, so that a run that was killed goes on behind the last one.
"""

import functools
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ..common import jsonl
from ..common.endpoint import Endpoint, NotAnswered
from ..common.files import finite, read_json, write_json, write_text
from ..common.report import as_markdown, provenance
from ..common.statistics import sample, summarise
from ..config import DataError, HaclError
from . import Question
from .benchmark import Benchmark, digest
from .command import EvalOptions
from .journal import Answers, check_settings
from .mmhal import Rubric

_SHOWN = 10  # failures of a task that are printed one by one
_HOPELESS = 20  # failures in a row from the beginning that end a run
_JUDGEMENT = 1024  # tokens of a verdict at most


class Judge(NamedTuple):
    """A model that judges answers, and its prompt."""

    endpoint: Endpoint
    rubric: Rubric


def say(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr, flush=True)


class Task:
    """A benchmark in a folder of its own.

    Attributes:
        benchmark: what is asked. name: as people read it. folder: of its files. asked: the questions of this run.
        settings: what its answers depend on. journal: its answers, once it is opened.
    """

    def __init__(self, benchmark: Benchmark, options: EvalOptions) -> None:
        self.benchmark, self.options, questions = benchmark, options, benchmark.questions
        self.name = "".join(c if c.isprintable() else " " for c in benchmark.name)
        self.folder = Path(options.output, re.sub(r"\W+", "-", self.name.lower()).strip("-") or "task")
        self.asked = sample(questions, options.limit, options.seed) if options.limit else questions
        self.settings = {
            "task": self.name,
            "questions": digest([[q.id, q.image, q.text] for q in questions]),
            "max_new_tokens": options.max_new_tokens or benchmark.max_new_tokens,
        }
        self.journal = None

    def open(self, settings: dict[str, Any]) -> Answers:
        """Read the answers so far, in a journal to be closed; HaclError if they are of other settings (the model's)."""
        old = check_settings(self.folder / "settings.json", settings | self.settings)
        here = os.path.abspath(self.options.images)
        if old.get("images", here) != here:  # moved, mostly; but these may be others under the same names
            say(
                f"{self.name}: the answers in {self.folder} were given with --images {old['images']}, now it is "
                f"{here}; they are kept. If these are other images, choose another --output."
            )
        self.journal = Answers(self.folder / "answers.jsonl", "question_id")
        return self.journal

    def pending(self) -> list[Question]:
        """The questions of this run that have no answer yet."""
        return [q for q in self.asked if "text" not in self.journal.lines.get(q.id, ())]

    def ask(self, model: Any, name: str, settings: dict[str, Any]) -> None:
        """Get the answers that are missing.

        Args:
            model: an `Answerer` or `EndpointAnswerer`. name: the model's. settings: the model's.

        Raises:
            HaclError: an earlier run had other settings; the first `_HOPELESS` all failed; the model cannot go on.
        """
        path, settings = self.folder / "settings.json", settings | self.settings
        check_settings(path, settings)
        if not path.exists():
            self.folder.mkdir(exist_ok=True)
            write_json(path, settings | {"images": os.path.abspath(self.options.images)})
        pending = self.pending()

        def lines():
            for answer in model.answers(pending, self.options.images, self.settings["max_new_tokens"]):
                question = answer.question
                said = {"text": answer.text} if answer.error is None else {"error": answer.error}
                line = {"question_id": question.id, "image": question.image, "prompt": question.text}
                yield line | said | {"model_id": name}

        hint = f"See to --images {self.options.images} and to the model; the same command asks them again."
        self._write_down(lines(), self.journal, self.name, len(pending), len(self.asked), hint)

    def _write_down(self, lines: Iterable[dict], journal, title, missing, of, hint=None):
        """Lines into a journal as they come, with a bar; with a hint, nothing but failures ends the run."""
        failed, done = 0, of - missing
        with tqdm(total=of, initial=done, desc=title, file=sys.stderr) as bar:
            for line in lines:
                journal.append(line)
                bar.update()
                if "error" not in line:
                    done += 1
                    continue
                failed += 1
                if failed <= _SHOWN:
                    more = " (no more of these are shown)" if failed == _SHOWN else ""
                    bar.write(f"{self.name}, question {line['question_id']}: {line['error']}{more}", file=sys.stderr)
                if hint and failed >= _HOPELESS and not done:
                    raise HaclError(
                        f"{self.name}: the first {failed} questions all failed, the last so: {line['error']} {hint}"
                    )

    def _verdicts(self, judge):
        """{question id: what the judge's verdict gives}, a verdict that cannot be had as {"error"}.

        Each is asked for once for each judge, rubric and answer.
        """
        endpoint = judge.endpoint
        who = {"judge": endpoint.model, "url": endpoint.url, "rubric": digest(judge.rubric)}
        answers = {q.id: self.journal.lines[q.id].get("text") for q in self.asked}
        keys = {i: (i, *who.values(), answer) for i, answer in answers.items() if answer is not None}
        ask = functools.partial(endpoint.ask, max_tokens=_JUDGEMENT)

        def lines():
            for q, verdict in endpoint.each(lambda q: self.benchmark.score(q, answers[q.id], ask, judge.rubric), todo):
                failed = isinstance(verdict, NotAnswered)
                said = {"error": f"no verdict from the judge: {verdict}"} if failed else {"verdict": verdict}
                yield {"question_id": q.id, **who, "answer": answers[q.id], **said}

        with Answers(self.folder / "judgements.jsonl", "question_id", *who, "answer") as journal:
            endpoint.known = any("verdict" in line for line in journal.lines.values())
            todo = [q for q in self.asked if q.id in keys and "verdict" not in journal.lines.get(keys[q.id], ())]
            self._write_down(lines(), journal, f"judging {self.name}", len(todo), len(keys))
        journal.sort(keys.values())
        found = {i: journal.lines[key] for i, key in keys.items()}
        return {i: line.get("verdict") or {"error": line["error"]} for i, line in found.items()}

    def finish(self, model: str, judge: Judge | None = None) -> None:
        """Score the answers, by the judge where it takes one; write items.jsonl and results.json."""
        of, options = self.benchmark, self.options
        self.journal.sort(q.id for q in of.questions)
        verdicts = self._verdicts(judge) if of.judged else {}
        items = []
        for q in self.asked:
            line = self.journal.lines[q.id]
            item = {"id": q.id, "image": q.image, "question": q.text}
            item |= {name: value for name, value in q.facts.items() if name == "label"}
            if "text" in line:
                item |= {"answer": line["text"], **(verdicts.get(q.id) or of.score(q, line["text"]))}
            else:
                item["error"] = line["error"]
            items.append(item)
        sums = Counter()
        for item in items:
            sums.update(item.get("counts", {}))
        scored = sum("counts" in item for item in items)
        counts = {"questions": len(items), "scored": scored, "failed": len(items) - scored, "unclear": 0, **sums}
        metrics = summarise(of.metrics, items, seed=options.seed)
        result = {"task": self.name, "kind": of.kind, "model": model, "metrics": metrics, "counts": counts}
        # besides what answers depend on: what figures do, by content, so that the same lists may lie elsewhere
        settings = read_json(self.folder / "settings.json")
        settings |= {"truth": digest([[q.id, q.facts] for q in of.questions]), **of.lists}
        if of.judged:
            rubric, endpoint = judge.rubric, judge.endpoint
            result["judge"] = {"name": endpoint.model, "url": endpoint.url, "rubric": rubric.name}
            result["judge"]["rubric_sha256"] = digest(rubric)
            settings |= {"judge": endpoint.model, "rubric": rubric.name}
        result |= {"images": os.path.abspath(options.images), "settings": settings}
        result["provenance"] = provenance(options.seed)
        jsonl.write(self.folder / "items.jsonl", items)
        write_json(self.folder / "results.json", result)


def write_table(output: Path) -> None:
    """Write evaluation.json and results.md over all tasks in a folder; print the table."""
    results, entries, rows, undefined = {}, [], [], []
    for path in output.glob("*/results.json"):
        result = read_json(path, "; remove it", expected=dict)
        if not {"task", "model", "metrics", "counts"} <= set(result):
            raise DataError(f"{path}: is not what an evaluation writes; remove it.")
        results[result["task"]] = result
    for task, result in sorted(results.items()):
        last = [result["counts"][name] for name in ("scored", "failed", "unclear")]
        defined = {name: found for name, found in finite(result["metrics"]).items() if found["value"] is not None}
        undefined += [f"{name} of {task}" for name in result["metrics"] if name not in defined]
        for name, found in defined.items():
            value, interval = found["value"], found["interval"]
            entries.append({"task": task, "metric": name, "value": value})
            low_high = "–"
            if None not in interval:
                entries[-1]["interval"] = interval
                low_high = "{:.3f} – {:.3f}".format(*interval)
            rows.append((task, name, f"{value:.3f}", low_high, *last))
        if not defined:
            rows.append((task, "–", "–", "–", *last))
    if entries:
        write_json(output / "evaluation.json", entries)
    models = sorted({result["model"] for result in results.values()})
    judges = sorted({f"{r['judge']['name']} ({r['judge']['rubric']})" for r in results.values() if "judge" in r})
    head = ("task", "metric", "value", "95 % interval", "scored", "failed", "unclear")
    notes = ["Intervals: percentile bootstrap over images."]
    if undefined:
        notes.append(f"Undefined, as there is nothing to divide by: {', '.join(undefined)}.")
    if judges:
        notes.append(f"Judge: {', '.join(judges)}.")
    text = as_markdown([("heading", 1, ", ".join(models)), ("table", head, rows), *(("text", note) for note in notes)])
    write_text(output / "results.md", text)
    print(text)
    failed = sum(result["counts"]["failed"] for result in results.values())
    if failed:
        say(f"{failed} question{'s' * (failed > 1)} failed, counted in no figure; the same command asks again.")
    print(f"{output}/results.md: written.")
