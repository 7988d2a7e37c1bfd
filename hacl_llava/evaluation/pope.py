"""POPE: is this object in the image, yes or no? (Li et al., EMNLP 2023, arXiv 2305.10355).

Answers are judged as POPE's own script does (``evaluate.py`` of AoiDragon/POPE; ``llava/eval/eval_pope.py`` does the
same): the text up to the first full stop, without commas, split at spaces; "No", "no" or "not" among the words means
no, anything else means yes, so also an empty answer, "NO", "No" before a line break, and every other language. The
verdict is kept, so that figures can stand beside published ones; answers in which it is doubtful are counted as
``unclear`` beside it. Where that script goes wrong (answers paired by their order, divisions by zero, labels that are
neither yes nor no), this one differs: docs/evaluation.md.
"""

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from ..common.files import read_records
from ..common.statistics import ratio
from ..config import DataError
from . import Question
from .benchmark import SHORT, Benchmark, in_one_word

MAX_NEW_TOKENS = 128  # llava/eval/model_vqa_loader.py's default, which LLaVA's scripts/v1_5/eval/pope.sh keeps
_records = partial(
    read_records,
    hint="; expected POPE's question_id, image, text and label",
    key="question_id",
    question_id=(int, str),
    image=str,
    text=str,
)


def _questions(c):
    return c["tp"] + c["fp"] + c["tn"] + c["fn"]


METRICS = {
    "accuracy": lambda c: ratio(c["tp"] + c["tn"], _questions(c)),
    "precision": lambda c: ratio(c["tp"], c["tp"] + c["fp"]),
    "recall": lambda c: ratio(c["tp"], c["tp"] + c["fn"]),
    # With no true positive, precision and recall are 0 or undefined, and so their harmonic mean is undefined.
    "f1": lambda c: ratio(2 * c["tp"], (2 * c["tp"] + c["fp"] + c["fn"]) * (c["tp"] > 0)),
    "yes_ratio": lambda c: ratio(c["tp"] + c["fp"], _questions(c)),
    "unclear": lambda c: ratio(c["unclear"], _questions(c)),
}


def task_name(path: str | os.PathLike) -> str:
    """What a question file is called: ``coco_pope_adversarial.json`` is "POPE coco adversarial", others their stem."""
    stem = Path(path).stem
    found = re.fullmatch(r"(\w+?)_pope_(seem_)?(random|popular|adversarial)", stem)
    if not found:
        return f"POPE {stem}"
    # only COCO has files of both kinds: people's objects, and those that SEEM's segmentation found
    data, seem, kind = found.groups()
    return f"POPE {data} {'seem ' if seem and data == 'coco' else ''}{kind}"


def read(path: str | os.PathLike) -> list[Benchmark]:
    """Read one question file; a file with categories is several tasks.

    Args:
        path: json lines (or a json list) of ``question_id``, ``image``, ``text`` and ``label`` ("yes" or "no"), as
            POPE's files; or LLaVA's ``llava_pope_test.jsonl``: with ``category`` and no labels, which are then found by
            image and question in ``coco_pope_<category>.json`` in the same folder or in ``coco/`` in it (LLaVA's
            layout).

    Returns:
        One `Benchmark`, or one for each category. A question's ``text`` is complete, its ``facts`` are ``{"label"}``.

    Raises:
        DataError: a line is no question, a label is neither yes nor no, an id comes twice in the file; names the line.
    """
    tasks, labels = {}, {}
    for where, row in _records(path):
        label, category, image = row.get("label"), row.get("category"), row["image"]
        if label is None:
            if category not in labels:
                labels[category] = _labels(path, where, category)
            label = labels[category].get((image, _bare(row["text"])))
            if label is None:
                raise DataError(
                    f"{where}: no label, and coco_pope_{category}.json has no question {_bare(row['text'])!r} on "
                    f"{image}; take the files of one release of POPE."
                )
        if label not in ("yes", "no"):
            raise DataError(f'{where}: label {label!r}; allowed are "yes" and "no".')
        name = task_name(path)
        if category is not None:
            coco = image.rpartition("/")[2].startswith("COCO_")
            name = f"POPE coco {category}" if coco else f"{name} {category}"
        question = Question(str(row["question_id"]), image, in_one_word(row["text"]), {"label": label})
        tasks.setdefault(name, []).append(question)
    return [Benchmark("pope", name, asked, MAX_NEW_TOKENS, METRICS, score) for name, asked in tasks.items()]


def _bare(text):
    return text.strip().removesuffix(SHORT.strip()).strip()


def _labels(path, where, category):
    name, folder = f"coco_pope_{category}.json", Path(path).parent
    for file in (folder / name, folder / "coco" / name):
        if category is not None and file.is_file():
            return {(row["image"], _bare(row["text"])): row.get("label") for _, row in _records(file)}
    beside = f"; put POPE's {name} into {folder} or {folder / 'coco'}" if category is not None else ""
    raise DataError(f"{where}: has no label{beside}, or give POPE's own question files, which have labels.")


def parse(answer: str) -> str:
    """ "yes" or "no", as POPE's script takes an answer."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def doubt(answer: str) -> str | None:
    """Why an answer is unclear, or None: any case, whole words, in the whole answer."""
    words = {w.replace("’", "'") for w in re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", answer.lower())}
    yes, no = "yes" in words, bool(words & {"no", "not"}) or any(w.endswith("n't") for w in words)
    if yes and no:
        return "both yes and no"
    if not yes and not no:
        return "neither yes nor no" if words else "no words"
    if (parse(answer) == "yes") != yes:
        return "the official rule misses its no" if no else "the official rule takes it for no"
    return None


def score(question: Question, answer: str) -> dict[str, Any]:
    """One answer.

    Returns:
        ``counts``: one of tp, fp, tn, fn ("yes" is positive), correct, unclear; ``parsed`` and ``label``, "yes" or
        "no"; ``doubt``: why it is unclear, or None.
    """
    parsed, label, reason = parse(answer), question.facts["label"], doubt(answer)
    cell = {("yes", "yes"): "tp", ("yes", "no"): "fp", ("no", "no"): "tn", ("no", "yes"): "fn"}[parsed, label]
    counts = {name: int(name == cell) for name in ("tp", "fp", "tn", "fn")}
    counts |= {"correct": int(parsed == label), "unclear": int(reason is not None)}
    return {"counts": counts, "parsed": parsed, "label": label, "doubt": reason}
