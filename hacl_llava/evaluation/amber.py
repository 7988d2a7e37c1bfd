"""AMBER: hallucination in descriptions and in yes/no answers, without a judge (Wang et al. 2023, arXiv 2311.07397).

Definitions are those of the official ``inference.py`` (junyangwang0410/AMBER), as shares of 1 instead of per cent.
Of a description's nouns those count that are in AMBER's own list (``relation.json``: objects, each with words that go
with it). ``chair``: of them the share that is neither an annotated object (``truth``), nor a word that goes with one,
nor safe; ``hal``: descriptions that have such a noun; ``cover``: annotated objects that are named; ``cog``: objects
that are named, of those (``hallu``) that people would expect and that are not there. Of yes/no answers, NO is the
positive class. ``amber_score`` is the mean of ``1 - chair`` and ``f1``. What differs: docs/evaluation.md.
"""

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..common.files import read_json, read_records, read_text
from ..common.statistics import ratio
from ..config import DataError
from ..hallucinate.lexicon import DETERMINERS, NUMBER, PRONOUNS, TOKEN, lexicon, singulars
from . import Question
from .benchmark import Benchmark, described, digest, in_one_word

MAX_NEW_TOKENS = 512  # AMBER names none; as for CHAIR
_HINT = "; give AMBER's data folder"
_RELATION, _SAFE = "relation.json", "safe_words.txt"

KINDS = ("existence", "state", "number", "action", "relation")
_KIND = {f"discriminative-attribute-{kind}": kind for kind in KINDS[1:4]} | {"discriminative-hallucination": KINDS[0]}
_GROUPS = {"": KINDS, "existence_": KINDS[:1], "attribute_": KINDS[1:4], **{f"{kind}_": (kind,) for kind in KINDS[1:]}}


def _yes_no(prefix, kinds):
    def of(c, name):
        return sum(c[f"{kind}_{name}"] for kind in kinds)

    return {
        f"{prefix}accuracy": lambda c: ratio(of(c, "correct"), of(c, "questions")),
        f"{prefix}precision": lambda c: ratio(of(c, "no_correct"), of(c, "no_answered")),
        f"{prefix}recall": lambda c: ratio(of(c, "no_correct"), of(c, "no")),
        f"{prefix}f1": lambda c: ratio(
            2 * of(c, "no_correct"), (of(c, "no") + of(c, "no_answered")) * (of(c, "no_correct") > 0)
        ),
    }


METRICS = {
    "chair": lambda c: ratio(c["hallucinated"], c["mentions"]),
    "cover": lambda c: ratio(c["covered"], c["truth"]),
    "hal": lambda c: ratio(c["sentence_hallucinated"], c["sentences"]),
    "cog": lambda c: ratio(c["expected_named"], c["expected"]),
    "words": lambda c: ratio(c["words"], c["sentences"]),
    "amber_score": lambda c: (1 - METRICS["chair"](c) + METRICS["f1"](c)) / 2,
    "unclear": lambda c: ratio(c["unclear"], sum(c[f"{kind}_questions"] for kind in KINDS)),
}
for _group in _GROUPS.items():
    METRICS |= _yes_no(*_group)


class Words(NamedTuple):
    """AMBER's lists: words that go with each object; lower-case word -> as AMBER writes it; words that are safe."""

    related: Mapping[str, list[str]]
    known: Mapping[str, str]
    safe: frozenset[str]


def read_words(folder: str | os.PathLike) -> Words:
    """Read ``relation.json`` and ``safe_words.txt`` of AMBER's data folder; DataError if they are not that."""
    path = Path(folder) / _RELATION
    related = read_json(path, _HINT, expected=dict)
    if not all(isinstance(v, list) and all(isinstance(w, str) for w in v) for v in related.values()):
        raise DataError(f"{path}: expected an object of lists of words, as AMBER's relation.json.")
    known = {word.lower(): word for key, words in related.items() for word in (key, *words)}  # it has "TV"
    return Words(related, known, frozenset(read_text(Path(folder) / _SAFE, _HINT).split()))


def read(path: str | os.PathLike) -> list[Benchmark]:
    """Read AMBER's questions.

    Args:
        path: AMBER's data folder (``annotations.json``, ``query/query_all.json``, ``relation.json``,
            ``safe_words.txt``), the folder around ``data``, or one of its query files
            (``data/query/query_generative.json``) for a part of the questions.

    Returns:
        One `Benchmark`: "AMBER", or "AMBER generative" of ``query_generative.json``. It has descriptions and yes/no
        questions together, because ``amber_score`` is made of both. A question's ``text`` is complete; its ``facts``
        are ``type`` and ``truth``, and of a description ``hallu``.

    Raises:
        DataError: a file is missing or is none of AMBER's, a question has no annotation, an id comes twice.
    """
    query = Path(path)
    if query.is_dir():
        folder = query / "data" if (query / "data" / "annotations.json").exists() else query
        query = folder / "query" / "query_all.json"
    else:
        folder = query.parent.parent
    words, annotations, questions = read_words(folder), {}, []
    for where, row in read_records(folder / "annotations.json", _HINT, key="id", id=int, type=str):
        annotations[row["id"]] = _facts(where, row, words.related)
    for where, row in read_records(query, _HINT, key="id", id=int, image=str, query=str):
        if (facts := annotations.get(row["id"])) is None:
            raise DataError(f"{where}: has no annotation; take the files of one release.")
        text = row["query"].strip() if "hallu" in facts else in_one_word(row["query"])
        questions.append(Question(str(row["id"]), row["image"], text, facts))
    lists = {}
    if any("hallu" in q.facts for q in questions):
        lists["words"] = digest([(folder / name).read_bytes().hex() for name in (_RELATION, _SAFE)])
    name = f"AMBER {query.stem.removeprefix('query_')}".removesuffix(" all")
    return [Benchmark("amber", name, questions, MAX_NEW_TOKENS, METRICS, partial(score, words=words), lists=lists)]


def _facts(where, row, related):
    facts = {"type": row["type"], "truth": row.get("truth")}
    if row["type"] != "generative":
        if facts["truth"] not in ("yes", "no"):
            raise DataError(f'{where}: truth {facts["truth"]!r}; allowed are "yes" and "no".')
        return facts
    facts["hallu"] = row.get("hallu")
    for key in ("truth", "hallu"):
        if not isinstance(facts[key], list):
            raise DataError(f"{where}: {key} is not a list of words.")
        if strange := [word for word in facts[key] if word not in related]:
            raise DataError(f"{where}: {key} has {strange[0]!r}, which is not in {_RELATION}.")
    return facts


def nouns(text: str, known: Mapping[str, str]) -> list[str]:
    """AMBER's words in a text: ``known`` maps a lower-case word to itself as AMBER writes it.

    A word is taken for itself or for the singular that AMBER has. Not for nouns are taken: "can" but after a
    determiner, a number or "trash" and the like; what may be a verb after "to", a pronoun, a modal verb or a plural
    ("people watch"); words that the dictionary has as adjectives only ("hot").
    """
    found, words, before = [], lexicon(), ""
    for token in (re.sub(r"['’]s$", "", token.lower()) for token in TOKEN.findall(text)):
        last, before = before, token
        forms = (token, *singulars(token), *([token[:-1]] if token.endswith("s") else []))
        if (form := next((form for form in forms if form in known), None)) is None:
            continue
        if form == "can":
            other = token == form and not (last in DETERMINERS or last in NUMBER or last in _CANS)
        elif token == form and (last in PRONOUNS or last in _ACTING or any(n in words.nouns for n in singulars(last))):
            other = words.verbs.get(form)
        else:
            other = form in words.adjectives and form not in words.nouns and form not in words.own
        if not other:
            found.append(known[form])
    return found


_CANS = "trash garbage soda beer tin watering spray paint metal coke aluminum aluminium rubbish recycling".split()
_ACTING = "people to can could will would may might must should cannot not n't don't doesn't".split()  # verbs follow


def _places(objects, related):
    """Each word -> the first object that it fits; words that go with an object come before the objects' own names."""
    places = [(word, place) for place, name in enumerate(objects) for word in related[name]]
    places += [(name, place) for place, name in enumerate(objects)]
    return dict(reversed(places))


def _described(question, answer, words):
    truth, hallu = question.facts["truth"], question.facts["hallu"]
    there, expected = (_places(objects, words.related) for objects in (truth, hallu))
    found = nouns(answer, words.known)
    counted = [noun for noun in found if noun not in words.safe]
    wrong = [noun for noun in counted if noun not in there]
    covered = {there[noun] for noun in counted if noun in there}
    named = {expected[noun] for noun in wrong if noun in expected}
    more = {"covered": len(covered), "truth": len(truth), "expected_named": len(named), "expected": len(hallu)}
    return described(answer, found, wrong, truth, **more)


def parse(answer: str) -> str | None:
    """ "yes" or "no" by the answer's first word, in any case and without marks; None where it is neither."""
    word = re.match(r"\W*(\w*)", answer)[1].lower()
    return word if word in ("yes", "no") else None


def score(question: Question, answer: str, words: Words) -> dict[str, Any]:
    """One answer.

    Returns:
        Of a description: as `described`, with covered of truth and expected_named of expected. Of a yes/no question:
        counts ``<kind>_questions``, ``_correct``, ``_no`` (to be answered no), ``_no_answered``,
        ``_no_correct``, and correct and unclear; ``parsed``, ``label``.
    """
    if "hallu" in question.facts:
        return _described(question, answer, words)
    kind = _KIND.get(question.facts["type"], "relation")
    parsed, label = parse(answer), question.facts["truth"]
    of_kind = {"questions": True, "correct": parsed == label, "no": label == "no", "no_answered": parsed == "no"}
    of_kind["no_correct"] = parsed == label == "no"
    counts = {f"{kind}_{name}": int(value) for name, value in of_kind.items()}
    counts |= {"correct": int(parsed == label), "unclear": int(parsed is None)}
    return {"counts": counts, "parsed": parsed, "label": label}
