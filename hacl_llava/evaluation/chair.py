"""CHAIR: how many of the objects that a caption names are not in the image (Rohrbach et al., EMNLP 2018,
arXiv 1809.02156).

Only COCO's 80 categories are looked for, each under many names. What is in an image is what COCO's boxes and its five
human captions say together, as in the official script (``utils/chair.py`` of LisaAnne/Hallucination); with one of the
two files alone more counts as hallucinated.

- ``chair_i``: mentions of objects that are not there, of all mentions; ``chair_s``: captions with at least one;
- ``recall``: categories of the image that the caption names, of all its categories (over all images);
- ``words``: mean length of a caption; ``objects``: mean number of mentions. Shorter captions hallucinate less, so CHAIR
  says little without these two.

Words are made singular by this package's own rules instead of those of NLTK and pattern.en, and phrases of up to four
words are joined where the official script joins two.
"""

import functools
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..common.files import read_lines, read_text
from ..common.statistics import ratio
from ..config import DataError
from ..hallucinate.lexicon import lexicon, plural, singulars
from . import Question

NAME = "chair"
PROMPT = "Please describe this image in detail."  # this, 512 tokens and 500 images: chair_eval.py of OPERA (CVPR 2024)
MAX_NEW_TOKENS = 512
SYNONYMS = Path(__file__).with_name("coco_synonyms.txt")
METRICS = {
    "chair_i": lambda c: ratio(c["hallucinated"], c["mentions"]),
    "chair_s": lambda c: ratio(c["sentence_hallucinated"], c["sentences"]),
    "recall": lambda c: ratio(c["recalled"], c["truth"]),
    "words": lambda c: ratio(c["words"], c["sentences"]),
    "objects": lambda c: ratio(c["mentions"], c["sentences"]),
}

_TOKEN = re.compile(r"[^\W\d_]+(?:['’\-][^\W\d_]+)*|\d+|[^\w\s]")
_LONGEST = 4  # words of a phrase
# The special cases of the official script, applied to a list in its format; one in ours says its own.
_AGED = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split()
_OFFICIAL = {f"{age} {animal}": animal for age in ("baby", "adult") for animal in _AGED} | {
    "passenger jet": "jet",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "home plate": "home plate",
}


class Synonyms(NamedTuple):
    """``category``: word or phrase -> its category, None where it names none. ``colours``: no objects before a noun."""

    category: dict
    colours: frozenset


def _tokens(text):
    # One with a hyphen is a phrase where the list has it so: "hot-dog", but "man-made" has no man.
    found = (re.sub(r"(?:['’]s|['’])$", "", token) for token in _TOKEN.findall(text.lower()))
    return [token.replace("-", " ") for token in found if token]


def _key(phrase):
    return " ".join(_tokens(phrase))


@functools.lru_cache(maxsize=8)
def _read(path):  # noqa: C901
    text = read_text(path)
    # comments, and lines that go on with the one before
    lines = re.sub(r"\n[ \t]+", " ", re.sub(r"(?m)^#.*\n?", "", text)).splitlines()
    lines = [(line, line.strip()) for line in lines if line.strip()]
    ours = any(":" in line for line, _ in lines)
    category, colours, later = {}, set(), []

    def add(phrase, name, line):
        for form in (_key(phrase), _key(plural(phrase))):
            if category.setdefault(form, name) != name and form == _key(phrase):
                raise DataError(f"{path}: {phrase!r} is in {category[form]!r} and in {name!r} ({line[:60]!r}).")

    for _, line in lines:
        if ours and line[0] in "->~":
            later.append(line)
            continue
        name, words = line.split(":", 1) if ours and ":" in line else (line.split(",")[0], line)
        if ours and ":" not in line:
            raise DataError(f"{path}: {line[:60]!r} is no line of a list of synonyms; see the head of {SYNONYMS.name}.")
        name = name.strip()
        for word in [name, *words.split(",")]:
            if word.strip():
                add(word.strip().lower(), name, line)
    for line in later:
        words, _, target = line[1:].partition("=")
        words = [w.strip() for w in words.split(",") if w.strip()]
        target = target.strip() or None
        if target is not None and target not in category:
            raise DataError(f"{path}: {target!r} is no category ({line[:60]!r}).")
        if line[0] == "~":
            colours.update(words)
        else:
            for word in words:
                add(word, category[target] if target else None, line)
    if not category:
        raise DataError(f"{path}: no synonyms in it; expected a line of words for each category.")
    if not ours:
        for phrase, word in _OFFICIAL.items():
            for form, single in ((phrase, word), (plural(phrase), word)):
                category[form] = category.get(single)
    return Synonyms(category, frozenset(colours))


def read_synonyms(path: str | os.PathLike | None = None) -> Synonyms:
    """Read a list of synonyms.

    Args:
        path: in the format of ``coco_synonyms.txt`` (its head says it), or in that of CHAIR's own ``data/synonyms.txt``
            (a category a line, words with commas between, the first names it); None: this package's own.

    Returns:
        `Synonyms`; to a list of CHAIR's format its script's special cases are added ("baby elephant" is no person).

    Raises:
        DataError: it cannot be read, or a word is in two categories.
    """
    return _read(str(path or SYNONYMS))


def mentions(text: str, synonyms: Synonyms) -> list[tuple[str, str]]:
    """The objects that a text names: [(word or phrase as it stands, category)], in order, repeats included."""
    tokens, found, i = _tokens(text), [], 0
    while i < len(tokens):
        for n in range(min(_LONGEST, len(tokens) - i), 0, -1):
            phrase = " ".join(tokens[i : i + n])
            forms = (phrase, *singulars(phrase)) if n == 1 else (phrase,)
            form = next((f for f in forms if f in synonyms.category), None)
            if form is not None:
                break
        following = tokens[i + n] if i + n < len(tokens) else ""
        colour = form in synonyms.colours and following and lexicon().noun(following) is not None
        if form is not None and synonyms.category[form] is not None and not colour:
            found.append((phrase, synonyms.category[form]))
        i += n
    # As in the official script: the seat of a toilet is no chair, wherever it is named.
    if any(category == "toilet" for _, category in found):
        found = [(word, category) for word, category in found if word not in ("seat", "seats")]
    return found


def read(
    paths: str | Path | Sequence[str | os.PathLike], synonyms: str | os.PathLike | None = None, prompt: str = PROMPT
) -> list[Question]:
    """Read what is in the images.

    Args:
        paths: one path or several, of COCO's ``instances_val2014.json`` and ``captions_val2014.json`` (2017
            likewise), or of json lines with ``image``, ``captions`` (texts) and ``instances`` (``{"category": ...}``).
        synonyms: path of a list for `read_synonyms`. prompt: what is asked.

    Returns:
        A `Question` for each image that has a box or a caption, by name; ``facts``: ``objects``, the categories in it,
        and ``synonyms``, the list they were found with, which `score` uses too.

    Raises:
        DataError: a file cannot be read, is of neither kind, or has a category that the list does not know.
    """
    words, objects = read_synonyms(synonyms), {}
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        for where, image, category, caption in _annotations(path):
            here = objects.setdefault(image, set())
            if category is not None:
                name = words.category.get(_key(category))
                if name is None:
                    raise DataError(f"{where}: category {category!r} is not in {synonyms or SYNONYMS.name}.")
                here.add(name)
            if caption is not None:
                here.update(name for _, name in mentions(caption, words))
    if not objects:
        raise DataError(
            f"{paths if isinstance(paths, (str, Path)) else paths[0]}: no image with a box or a caption in it."
        )
    facts = {"synonyms": str(synonyms) if synonyms else None}
    stems = Counter(Path(i).stem for i in objects)
    names = {i: Path(i).stem if stems[Path(i).stem] == 1 else i for i in objects}  # a/1.jpg and b/1.jpg are not one
    return [Question(names[i], i, prompt, {"objects": sorted(objects[i]), **facts}) for i in sorted(objects)]


def _annotations(path):
    # (where, image file, category or None, caption or None)
    text = read_text(path)
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None  # json lines then, or an error with its line
    if isinstance(whole, dict) and "annotations" in whole:
        yield from _coco(path, whole)
        return
    for number, value in read_lines(path):
        where = f"{path}: line {number}"
        try:
            image, captions, instances = value["image"], value.get("captions", []), value.get("instances", [])
            if not isinstance(image, str) or any(not isinstance(c, str) for c in captions):
                raise TypeError
            if "captions" not in value and "instances" not in value:  # questions, or LLaVA's training data
                raise KeyError
            yield from ((where, image, i["category"], None) for i in instances)
            yield from ((where, image, None, c) for c in captions)
        except (TypeError, KeyError, AttributeError):
            raise DataError(
                f"{where}: expected COCO's instances_*.json or captions_*.json, or json lines with image, captions and "
                "instances (each with a category)."
            ) from None


def _coco(path, whole):
    try:
        files = {image["id"]: image["file_name"] for image in whole["images"]}
        names = {c["id"]: c["name"] for c in whole.get("categories", [])}
        for annotation in whole["annotations"]:
            where = f"{path}: annotation {annotation.get('id')}"
            image = files[annotation["image_id"]]
            if "caption" in annotation:
                yield where, image, None, annotation["caption"]
            else:
                yield where, image, names[annotation["category_id"]], None
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: no COCO instances or captions ({type(error).__name__}: {error}); expected images, annotations "
            "with image_id and category_id or caption, and categories."
        ) from None


def score(question: Question, answer: str) -> dict[str, Any]:
    """One caption.

    Returns:
        ``counts``: hallucinated and mentions (each mention counts), sentence_hallucinated of sentences (1), recalled of
        truth (each category once), words, correct (nothing hallucinated); ``objects``: [word, category] of every
        mention, ``hallucinated``: of those that are not there, ``truth``: the categories that are.
    """
    truth = set(question.facts["objects"])
    found = mentions(answer, read_synonyms(question.facts.get("synonyms")))
    wrong = [(word, category) for word, category in found if category not in truth]
    counts = {
        "hallucinated": len(wrong),
        "mentions": len(found),
        "sentence_hallucinated": int(bool(wrong)),
        "sentences": 1,
        "recalled": len(truth & {category for _, category in found}),
        "truth": len(truth),
        "words": len(re.findall(r"\w+(?:['’\-]\w+)*", answer)),
        "correct": int(not wrong),
    }
    return {
        "counts": counts,
        "objects": [list(pair) for pair in found],
        "hallucinated": [list(pair) for pair in wrong],
        "truth": sorted(truth),
    }
