"""MMHal-Bench: 96 questions that invite hallucination, judged by a language model (Sun et al. 2023, arXiv 2309.14525).

The judge sees no image: it gets the objects in it, the question, a human answer and the answer to be judged, and rates
0 to 6; below 3 means hallucination (``eval_gpt4.py`` of the data set Shengcao1006/MMHal-Bench). Its prompt is read from
the user's copy of that script (`read_rubric`), or is this package's own, whose figures cannot stand beside published
ones. Nor can those of another judge: the script's default was gpt-4-0314.

A reply counts as there: "rating: N" in it, with one N. Where it has none or several the script gives 0, that is
hallucination; here the judge is asked again, and at last the question is marked as failed.
"""

import ast
import os
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from ..common.endpoint import NotAnswered
from ..common.files import read_records, read_text
from ..common.statistics import ratio
from ..config import DataError
from . import Question
from .benchmark import Benchmark

MAX_NEW_TOKENS = 1024  # model_vqa_mmhal.py of LLaVA-RLHF, by the benchmark's authors
ATTEMPTS = 3
# the eight types, in the order of the benchmark's file
TYPES = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")
METRICS = {
    f"{name}{of}": lambda c, part=part, of=of: ratio(c[f"{part}{of}"], c[f"answers{of}"])
    for of in ("", *(f"_{kind}" for kind in TYPES))
    for name, part in (("score", "score"), ("hallucination_rate", "hallucination"))
}


class Rubric(NamedTuple):
    """A judge's prompt: its ``name`` in results; ``text`` with {} for objects, question, human and model's answer."""

    name: str
    text: str


OWN = Rubric(
    "own rubric, not comparable with published figures",
    """You check what a vision-language model said about a picture. You cannot see the picture; you know the following.

Things in the picture: {}
Question: {}
Answer of a human who saw the picture: {}
Answer to check: {}

A claim in the answer to check is a hallucination if the facts above contradict it, or if it states as seen something \
that nothing above supports. General knowledge, careful reasoning, "I cannot tell" and leaving things out are no \
hallucinations. The list of things and the human answer may be incomplete: what is merely more detailed, and likely in \
such a picture, is no hallucination.

First explain in two or three sentences. Then end with one line, "Rating: " and a single digit:
6 - no hallucination, answers fully, with good reasoning
5 - no hallucination, answers fully
4 - no hallucination, answers in part
3 - no hallucination, says little or nothing
2 - hallucination, but answers fully otherwise
1 - hallucination, answers in part otherwise
0 - hallucination, and nothing useful
""",
)


def read_rubric(path: str | os.PathLike | None = None) -> Rubric:
    """The judge's prompt.

    Args:
        path: MMHal-Bench's ``eval_gpt4.py``, of which the text assigned to ``template`` is taken (nothing is run), or a
            text file; with four {}: objects, question, human answer, answer to judge. None: this package's own.

    Raises:
        DataError: it cannot be read, has no such text, or not four {}.
    """
    if path is None:
        return OWN
    text = read_text(path)
    if Path(path).suffix == ".py":
        text = _template(path, text)
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(text) if field is not None]
    except ValueError as error:
        raise DataError(f"{path}: is no template ({error}); write {{{{ and }}}} for braces.") from None
    if fields != [""] * 4:
        raise DataError(f"{path}: has {len(fields)} fields {fields[:5]}, expected four {{}}, as in eval_gpt4.py.")
    return Rubric(f"{Path(path).name} given by the user", text)


def _template(path, source):
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise DataError(f"{path}: is no Python file ({error}).") from None
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            if any(isinstance(target, ast.Name) and target.id == "template" for target in node.targets):
                return node.value.value
    raise DataError(f"{path}: assigns no text to `template`; give MMHal-Bench's own eval_gpt4.py.")


def read(path: str | os.PathLike) -> list[Benchmark]:
    """Read the questions.

    Args:
        path: ``response_template.json``, or the folder that it is in.

    Returns:
        One `Benchmark`, judged, with a question for each record, as it is there. (LLaVA-RLHF's model_vqa_mmhal.py adds
        "... a single word or phrase." by default.) ``id``: its place from 0. ``image``: the file name of ``image_src``,
        as the benchmark's image folder has it. ``facts``: ``type``, ``content`` (objects in the image, a text),
        ``reference``.

    Raises:
        DataError: it cannot be read, or a record lacks a field; names the record.
    """
    path, questions = Path(path), []
    if path.is_dir():
        path = path / "response_template.json"
    hint = "; give MMHal-Bench's response_template.json"
    for where, row in read_records(path, hint, image_src=str, question=str, gt_answer=str):
        content = row.get("image_content", [])
        if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
            raise DataError(f"{where} has image_content {content!r:.100}; expected a list of texts.")
        image = unquote(urlsplit(row["image_src"]).path).rpartition("/")[2]
        kind = str(row.get("question_type", "")).strip().lower()
        facts = {"type": kind, "content": ", ".join(content), "reference": row["gt_answer"]}
        questions.append(Question(str(len(questions)), image, row["question"].strip(), facts))
    return [Benchmark("mmhal", "MMHal-Bench", questions, MAX_NEW_TOKENS, METRICS, score, judged=True)]


def parse(reply: str) -> int | None:
    """The rating 0 to 6 in a judge's reply, or None where there is none, a range, or several that differ; bold type is
    passed over."""
    plain = re.sub(r"[*_`]", "", reply).lower()
    found = set(re.findall(r"rating:\s*(\d+(?:\.\d+|\s*(?:[-–~]|or|to)\s*\d+)?)", plain))
    (rating,) = found if len(found) == 1 else (None,)
    return int(rating) if rating is not None and re.fullmatch("[0-6]", rating) else None


def score(
    question: Question, answer: str, ask: Callable[[list[dict[str, str]]], str], rubric: Rubric = OWN
) -> dict[str, Any]:
    """One answer, judged.

    Args:
        ask: function of the messages of an OpenAI-compatible chat (``[{"role", "content"}, ...]``) to the reply's text;
            what it raises passes through. Called up to `ATTEMPTS` times. rubric: of `read_rubric`.

    Returns:
        ``counts``: score (0 to 6), hallucination (0 or 1), answers (1), the same for the question's type, correct (no
        hallucination); ``rating``, ``judgement`` (the reply), ``rubric`` (its name).

    Raises:
        NotAnswered: no reply had a rating; the message has the last one.
    """
    facts = question.facts
    text = rubric.text.format(facts["content"], question.text, facts["reference"], answer)
    messages = [{"role": "user", "content": text}]
    for _ in range(ATTEMPTS):
        reply = ask(list(messages))
        rating = parse(reply)
        if rating is not None:
            break
        # The same again would get the same again from a judge at temperature 0.
        again = 'Your reply has no single rating. Reply with one line: "Rating: " and one digit from 0 to 6.'
        messages = [messages[0], {"role": "assistant", "content": reply}, {"role": "user", "content": again}]
    else:
        raise NotAnswered(
            f"MMHal-Bench question {question.id}: no rating from 0 to 6 in {ATTEMPTS} replies of the judge; the last "
            f"was {reply[:200]!r}.",
            refused=True,  # an answer of the judge's, which says nothing against the endpoint
        )
    counts = {"score": rating, "hallucination": int(rating < 3), "answers": 1}
    if facts["type"] in TYPES:
        counts |= {f"{name}_{facts['type']}": value for name, value in counts.items()}
    counts["correct"] = int(rating >= 3)
    return {"counts": counts, "rating": rating, "judgement": reply, "rubric": rubric.name}
