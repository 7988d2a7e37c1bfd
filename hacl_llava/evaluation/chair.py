"""CHAIR: how many of the objects that a caption names are not in the image (Rohrbach et al., EMNLP 2018,
arXiv 1809.02156).

Only COCO's 80 categories are looked for, each under many names. What is in an image is what COCO's boxes and its five
human captions say together, as in the official script (``utils/chair.py`` of LisaAnne/Hallucination). ``chair_i``:
mentions of objects that are not there, of all mentions; ``chair_s``: captions with at least one; ``recall``: categories
of the image that the caption names, of all its categories. Shorter captions hallucinate less, so that says little
without the means ``words`` and ``objects`` (mentions). What differs from the script: docs/evaluation.md.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..common.files import read_records, read_text
from ..common.statistics import ratio
from ..config import DataError
from ..hallucinate.lexicon import lexicon, plural, singulars
from . import Question
from .benchmark import Benchmark, described, digest

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
_OFFICIAL = {f"{age} {animal}": animal for age in ("baby", "adult") for animal in _AGED} | {"home plate": "home plate"}
_OFFICIAL |= {"passenger jet": "jet", "passenger train": "train", "bow tie": "tie", "toilet seat": "toilet"}


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


def read_synonyms(path: str | os.PathLike | None = None) -> Synonyms:
    """Read a list of synonyms; DataError if it cannot be read, or a word is in two categories.

    Args:
        path: in the format of ``coco_synonyms.txt`` (its head says it), or in that of CHAIR's own ``data/synonyms.txt``
            (a category a line, words with commas between, the first names it), to which its script's special cases
            are added ("baby elephant" is no person); None: this package's own.
    """
    path = path or SYNONYMS
    text = re.sub(r"(?m)^#.*\n?", "", read_text(path))  # comments
    text = re.sub(r"\n[ \t]+", " ", text)  # lines that go on with the one before
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ours = any(":" in line for line in lines)
    category, colours = {}, set()

    def add(words, name, line):
        for word in words:
            if category.setdefault(_key(word), name) != name:
                raise DataError(f"{path}: {word!r} is in {category[_key(word)]!r} and in {name!r} ({line[:60]!r}).")
            category.setdefault(_key(plural(word)), name)

    for line in sorted(lines, key=lambda line: ours and line[0] in "->~"):  # categories first
        if ours and line[0] in "->~":
            words, _, target = (part.strip() for part in line[1:].partition("="))
            if target and target not in category:
                raise DataError(f"{path}: {target!r} is no category ({line[:60]!r}).")
            if line[0] == "~":
                colours.update(_split(words))
            else:
                add(_split(words), category[target] if target else None, line)
        elif ours and ":" not in line:
            raise DataError(f"{path}: {line[:60]!r} is no line of a list of synonyms; see the head of {SYNONYMS.name}.")
        else:
            name, words = line.split(":", 1) if ours else (line.split(",")[0], line)
            add(_split(f"{name},{words}".lower()), name.strip(), line)
    if not category:
        raise DataError(f"{path}: no synonyms in it; expected a line of words for each category.")
    if not ours:
        for phrase, word in _OFFICIAL.items():
            category[phrase] = category[plural(phrase)] = category.get(word)
    return Synonyms(category, frozenset(colours))


def _split(words):
    return [word.strip() for word in words.split(",") if word.strip()]


def mentions(text: str, synonyms: Synonyms) -> list[tuple[str, str]]:
    """The objects that a text names: [(word or phrase as it stands, category)], in order, repeats included."""
    tokens, found, i = _tokens(text), [], 0
    while i < len(tokens):
        for n in range(min(_LONGEST, len(tokens) - i), 0, -1):
            phrase = " ".join(tokens[i : i + n])
            forms = (phrase, *singulars(phrase)) if n == 1 else (phrase,)
            if (form := next((f for f in forms if f in synonyms.category), None)) is not None:
                break
        i += n
        colour = form in synonyms.colours and i < len(tokens) and lexicon().noun(tokens[i]) is not None
        if not colour and (category := synonyms.category.get(form)) is not None:
            found.append((phrase, category))
    # As in the official script: the seat of a toilet is no chair, wherever it is named.
    if any(category == "toilet" for _, category in found):
        found = [(word, category) for word, category in found if word not in ("seat", "seats")]
    return found


def read(paths: Sequence[str | os.PathLike], synonyms: str | os.PathLike | None = None) -> list[Benchmark]:
    """Read what is in the images.

    Args:
        paths: of COCO's ``instances_val2014.json`` and ``captions_val2014.json`` (2017 likewise), or of json lines with
            ``image``, ``captions`` (texts) and ``instances`` (``{"category": ...}``). synonyms: as of `read_synonyms`.

    Returns:
        One `Benchmark`, with a question for each image that has a box or a caption, by name; ``facts``: ``objects``,
        the categories in it.

    Raises:
        DataError: a file cannot be read, is of neither kind, or has a category that the list does not know.
    """
    words, objects = read_synonyms(synonyms), {}
    for path in paths:
        for where, image, category, caption in _annotations(path):
            here = objects.setdefault(image, set())
            if category is not None:
                if (name := words.category.get(_key(category))) is None:
                    raise DataError(f"{where}: category {category!r} is not in {synonyms or SYNONYMS.name}.")
                here.add(name)
            if caption is not None:
                here.update(name for _, name in mentions(caption, words))
    if not objects:
        raise DataError(f"{paths[0]}: no image with a box or a caption in it.")
    stems = Counter(Path(i).stem for i in objects)
    names = {i: Path(i).stem if stems[Path(i).stem] == 1 else i for i in objects}  # a/1.jpg and b/1.jpg are not one
    asked = [Question(names[i], i, PROMPT, {"objects": sorted(objects[i])}) for i in sorted(objects)]
    lists = {"synonyms": digest(Path(synonyms).read_bytes().hex()) if synonyms else "own"}
    return [Benchmark("chair", "CHAIR", asked, MAX_NEW_TOKENS, METRICS, partial(score, synonyms=words), lists=lists)]


def _annotations(path):
    """(place, image file, category or None, caption or None) of each annotation."""
    try:
        whole = json.loads(read_text(path))
    except (ValueError, RecursionError):
        whole = None  # json lines then, or an error with its line
    where = path
    try:
        if isinstance(whole, dict) and "annotations" in whole:
            files = {image["id"]: image["file_name"] for image in whole["images"]}
            names = {c["id"]: c["name"] for c in whole.get("categories", [])}
            for annotation in whole["annotations"]:
                where = f"{path}: annotation {annotation.get('id')}"
                caption = annotation.get("caption")
                category = names[annotation["category_id"]] if caption is None else None
                yield where, files[annotation["image_id"]], category, caption
            return
        for where, value in read_records(path):
            if not {"captions", "instances"} & set(value):  # questions, or LLaVA's training data
                raise KeyError("captions")
            image, captions = value["image"], value.get("captions", [])
            if not all(isinstance(text, str) for text in (image, *captions)):
                raise TypeError("not a text")
            yield from ((where, image, i["category"], None) for i in value.get("instances", []))
            yield from ((where, image, None, c) for c in captions)
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{where}: expected COCO's instances_*.json or captions_*.json, or json lines with image, captions and "
            f"instances, each with a category ({type(error).__name__}: {error})."
        ) from None


def score(question: Question, answer: str, synonyms: Synonyms) -> dict[str, Any]:
    """One caption, as `described`: [word, category] of every mention, with recalled of truth (each category once)."""
    truth = question.facts["objects"]
    found = [list(pair) for pair in mentions(answer, synonyms)]
    wrong = [[word, category] for word, category in found if category not in truth]
    recalled = len({category for _, category in found if category in truth})
    return described(answer, found, wrong, truth, recalled=recalled, truth=len(truth))
