"""AMBER: hallucination in descriptions and in yes/no answers, without a judge (Wang et al. 2023, arXiv 2311.07397).

Definitions are those of the official ``inference.py`` (junyangwang0410/AMBER), as shares of 1 instead of per cent:

Descriptions. Of a description's nouns those are counted that are in AMBER's own list (``relation.json``: objects, each
with words that go with it).

- ``chair``: of them the share that is neither an annotated object (``truth``), nor a word that goes with one, nor in
  ``safe_words.txt``; ``hal``: descriptions that have such a noun;
- ``cover``: annotated objects that are named; ``cog``: objects that are named, of those (``hallu``) that people would
  expect and that are not there. A noun stands for the first object that it fits, in the order of the annotation.

Yes/no questions. ``accuracy``; ``precision``, ``recall`` and ``f1`` of the answer NO (the positive class of the
official script: saying no to what is not there); the same for ``existence``, ``attribute`` (``state``, ``number`` and
``action``) and ``relation``. All existence questions are to be answered no, so that precision is 1 wherever defined.

``amber_score`` is the mean of ``1 - chair`` and ``f1``.

What differs: the official script finds nouns with NLTK's tagger, and lets a noun pass that spaCy's word vectors find
similar (above 0.8) to an object's word. Both need downloads and change with their versions. Here a word is a noun by
this package's lexicon and the word before it, and only AMBER's own words count as alike. More nouns count as
hallucinated so, hence compare figures made by this scorer with each other, not with published ones. Yes/no: the
official script takes "Yes" and "No" alone and counts anything else as wrong; here the first word decides, in any case
("No, there is not."), and anything else is wrong too, and ``unclear``. It starts denominators at 0.001 and adds 0.0001
(existence: 0.001) in F1; here what is undefined is nan.
"""

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.files import read_json, read_text
from ..common.statistics import ratio
from ..config import DataError
from ..hallucinate.lexicon import DETERMINERS, NUMBER, PRONOUNS, TOKEN, lexicon, singulars
from . import Question

NAME = "amber"
SUFFIX = "\nAnswer the question using a single word or phrase."  # to yes/no questions only; LLaVA-1.5's, as for POPE
MAX_NEW_TOKENS = 512  # AMBER names none; as for CHAIR
_HINT = "; give AMBER's data folder"

# of the official types; those left over are relation ("relation", "discriminative-relation")
_KINDS = {
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-hallucination": "existence",
}
_GROUPS = {
    "": ("existence", "state", "number", "action", "relation"),
    "existence_": ("existence",),
    "attribute_": ("state", "number", "action"),
    "state_": ("state",),
    "number_": ("number",),
    "action_": ("action",),
    "relation_": ("relation",),
}


def _share(part, whole, kinds):
    return lambda c: ratio(sum(c[f"{k}_{part}"] for k in kinds), sum(c[f"{k}_{whole}"] for k in kinds))


def _f1(kinds):
    def f1(c):
        right = sum(c[f"{k}_no_correct"] for k in kinds)
        return ratio(2 * right, sum(c[f"{k}_no"] + c[f"{k}_no_answered"] for k in kinds) * (right > 0))

    return f1


def _chair(c):
    return ratio(c["hallucinated"], c["mentions"])


METRICS = {
    "chair": _chair,
    "cover": lambda c: ratio(c["covered"], c["truth"]),
    "hal": lambda c: ratio(c["sentence_hallucinated"], c["sentences"]),
    "cog": lambda c: ratio(c["expected_named"], c["expected"]),
    "words": lambda c: ratio(c["words"], c["sentences"]),
    "amber_score": lambda c: (1 - _chair(c) + _f1(_GROUPS[""])(c)) / 2,
    "unclear": lambda c: ratio(c["unclear"], sum(c[f"{k}_questions"] for k in _GROUPS[""])),
}
for _prefix, _kinds in _GROUPS.items():
    METRICS |= {
        f"{_prefix}accuracy": _share("correct", "questions", _kinds),
        f"{_prefix}precision": _share("no_correct", "no_answered", _kinds),
        f"{_prefix}recall": _share("no_correct", "no", _kinds),
        f"{_prefix}f1": _f1(_kinds),
    }


@functools.lru_cache(maxsize=4)
def _words(folder):
    # (words that go with each object, all words, safe words)
    path = Path(folder) / "relation.json"
    related = read_json(path, _HINT)
    if not isinstance(related, dict) or any(
        not isinstance(v, list) or any(not isinstance(w, str) for w in v) for v in related.values()
    ):
        raise DataError(f"{path}: expected an object of lists of words, as AMBER's relation.json.")
    safe = frozenset(read_text(Path(folder) / "safe_words.txt", _HINT).split())
    # "TV" is written so in AMBER's list
    known = {word.lower(): word for key, words in related.items() for word in (key, *words)}
    return related, known, safe


def read(path: str | os.PathLike, suffix: str = SUFFIX) -> dict[str, list[Question]]:
    """Read AMBER's questions.

    Args:
        path: AMBER's data folder (``annotations.json``, ``query/query_all.json``, ``relation.json``,
            ``safe_words.txt``), the folder around ``data``, or one of its query files
            (``data/query/query_generative.json``) for a part of the questions.
        suffix: what is added to each yes/no question that does not end so.

    Returns:
        ``{task name: [Question]}``, of one task: "AMBER", or "AMBER generative" of ``query_generative.json``. It has
        descriptions and yes/no questions together, because `METRICS`' ``amber_score`` is made of both. ``text`` is
        complete; ``facts`` has ``type`` and ``truth``, and of a description ``hallu`` and ``folder``.

    Raises:
        DataError: a file is missing or is none of AMBER's, a question has no annotation, an id comes twice.
    """
    path = Path(path)
    if path.is_dir():
        folder = path / "data" if (path / "data" / "annotations.json").exists() else path
        query, name = folder / "query" / "query_all.json", "AMBER"
    else:
        folder, query = path.parent.parent, path
        part = path.stem.removeprefix("query_")
        name = "AMBER" if part == "all" else f"AMBER {part}"
    related, _, _ = _words(str(folder))
    annotations = {}
    for i, value in enumerate(_rows(folder / "annotations.json")):
        problem = _annotation_problem(value, related)
        if problem:
            raise DataError(f"{folder / 'annotations.json'}: record {i} {problem}")
        annotations[value["id"]] = value
    questions, seen = [], set()
    for i, value in enumerate(_rows(query)):
        where = f"{query}: record {i}"
        if not isinstance(value, dict) or any(not isinstance(value.get(k), str) for k in ("image", "query")):
            raise DataError(f"{where}: expected an object with id, image and query.")
        annotation = annotations.get(value.get("id"))
        if annotation is None:
            raise DataError(f"{where} (id {value.get('id')!r}): has no annotation; take the files of one release.")
        if value["id"] in seen:
            raise DataError(f"{where} (id {value['id']!r}): the id comes twice.")
        seen.add(value["id"])
        facts, text = {"type": annotation["type"], "truth": annotation["truth"]}, value["query"].strip()
        if annotation["type"] == "generative":
            facts |= {"hallu": annotation["hallu"], "folder": str(folder)}
        elif suffix and not text.endswith(suffix.strip()):
            text += suffix
        questions.append(Question(str(value["id"]), value["image"], text, facts))
    if not questions:
        raise DataError(f"{query}: no questions in it.")
    return {name: questions}


def _rows(path):
    rows = read_json(path, _HINT)
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list, as AMBER's {Path(path).name}.")
    return rows


def _annotation_problem(value, related):
    if not isinstance(value, dict) or not isinstance(value.get("id"), int) or not isinstance(value.get("type"), str):
        return "is no annotation; expected an object with id, type and truth."
    if value["type"] != "generative":
        wrong = value.get("truth") not in ("yes", "no")
        return f'(id {value["id"]}): truth {value.get("truth")!r}; allowed are "yes" and "no".' if wrong else None
    for key in ("truth", "hallu"):
        words = value.get(key)
        if not isinstance(words, list):
            return f"(id {value['id']}): {key} is not a list of words."
        for word in words:
            if word not in related:
                return f"(id {value['id']}): {key} has {word!r}, which is not in relation.json."
    return None


def nouns(text: str, known: Mapping[str, str]) -> list[str]:
    """AMBER's words in a text: ``known`` maps a lower-case word to itself as AMBER writes it.

    A word is taken for itself or for the singular that AMBER has. Not for nouns are taken: "can" but after a
    determiner, a number or "trash" and the like; what may be a verb after "to", a pronoun, a modal verb or a plural
    ("people watch"); words that the dictionary has as adjectives only ("hot").
    """
    tokens, found, words = [t.lower() for t in TOKEN.findall(text)], [], lexicon()
    tokens = [re.sub(r"['’]s$", "", t) for t in tokens]
    for i, token in enumerate(tokens):
        forms = [token, *singulars(token), *([token[:-1]] if token.endswith("s") else [])]
        form = next((f for f in forms if f in known), None)
        if form is None:
            continue
        before = tokens[i - 1] if i else ""
        if form == "can":
            if token == "can" and before not in DETERMINERS and before not in NUMBER and before not in _CANS:
                continue
        elif token == form and (before in PRONOUNS or before in _MODALS or before == "people" or _is_plural(before)):
            if words.verbs.get(form):
                continue
        elif form in words.adjectives and form not in words.nouns and form not in words.own:
            continue
        found.append(known[form])
    return found


def _is_plural(word):
    return any(single in lexicon().nouns for single in singulars(word))


_CANS = frozenset(
    "trash garbage soda beer tin watering spray paint metal coke aluminum aluminium rubbish recycling".split()
)
_MODALS = frozenset("to can could will would may might must should cannot not n't don't doesn't".split())


def _described(question, answer):
    facts = question.facts
    related, known, safe = _words(facts["folder"])
    truth, hallu = facts["truth"], facts["hallu"]
    # The first that fits, and words that go with an object before the objects' own names: the official order.
    fits = [{}, {}]
    for table, objects in zip(fits, (truth, hallu)):
        for place, name in enumerate(objects):
            for word in related[name]:
                table.setdefault(word, place)
        for place, name in enumerate(objects):
            table.setdefault(name, place)
    found = nouns(answer, known)
    covered, named, wrong = set(), set(), []
    for noun in found:
        if noun in safe:
            continue
        if noun in fits[0]:
            covered.add(fits[0][noun])
        else:
            wrong.append(noun)
            if noun in fits[1]:
                named.add(fits[1][noun])
    counts = {
        "hallucinated": len(wrong),
        "mentions": len(found),
        "sentence_hallucinated": int(bool(wrong)),
        "sentences": 1,
        "covered": len(covered),
        "truth": len(truth),
        "expected_named": len(named),
        "expected": len(hallu),
        "words": len(re.findall(r"\w+(?:['’\-]\w+)*", answer)),
        "correct": int(not wrong),
    }
    return {"counts": counts, "objects": found, "hallucinated": wrong, "truth": truth}


def parse(answer: str) -> str | None:
    """ "yes" or "no" by the answer's first word, in any case and without marks; None where it is neither."""
    first = re.match(r"[^\w]*(\w+)", answer)
    word = first[1].lower() if first else ""
    return word if word in ("yes", "no") else None


def score(question: Question, answer: str) -> dict[str, Any]:
    """One answer.

    Returns:
        Of a description: counts (hallucinated, mentions, sentence_hallucinated, sentences, covered, truth,
        expected_named, expected, words, correct), ``objects``, ``hallucinated`` and ``truth`` (words). Of a yes/no
        question: counts ``<kind>_questions``, ``_correct``, ``_no`` (to be answered no), ``_no_answered``,
        ``_no_correct``, and correct and unclear; ``parsed``, ``label``.
    """
    if question.facts["type"] == "generative":
        return _described(question, answer)
    kind = _KINDS.get(question.facts["type"], "relation")
    parsed, label = parse(answer), question.facts["truth"]
    counts = {
        f"{kind}_questions": 1,
        f"{kind}_correct": int(parsed == label),
        f"{kind}_no": int(label == "no"),
        f"{kind}_no_answered": int(parsed == "no"),
        f"{kind}_no_correct": int(parsed == label == "no"),
        "correct": int(parsed == label),
        "unclear": int(parsed is None),
    }
    return {"counts": counts, "parsed": parsed, "label": label}
